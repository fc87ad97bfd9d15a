//! `--completions`: a script for each shell.

use std::process::Command;

use insta::assert_snapshot;

use crate::Folder;

const SHELLS: [&str; 5] = ["bash", "elvish", "fish", "powershell", "zsh"];

fn script(shell: &str) -> String {
    let outcome = Folder::new().run(["--completions", shell]);
    assert_eq!((outcome.exit.code(), outcome.stderr.as_str()), (0, ""));
    outcome.stdout
}

#[test]
fn every_shell_is_told_every_flag_under_the_programs_name() {
    for shell in SHELLS {
        let script = script(shell);
        assert!(script.contains("qwenlora-keys"), "{shell}");
        for flag in [
            "all",
            "explain",
            "map",
            "json",
            "color",
            "completions",
            "help",
            "version",
        ] {
            let is_there = [format!("--{flag}"), format!("-l {flag}")]
                .iter()
                .any(|spelling| script.contains(spelling));
            assert!(is_there, "{shell}: {flag}\n{script}");
        }
    }
}

#[test]
fn the_script_for_fish() {
    assert_snapshot!(script("fish"), @r#"
    complete -c qwenlora-keys -l explain -d 'why a key maps there: prefix, path, suffix, scale' -r -f
    complete -c qwenlora-keys -l color -d 'auto (a terminal without NO_COLOR), always or never' -r -f -a "auto\t''
    always\t''
    never\t''"
    complete -c qwenlora-keys -l completions -d 'completions: bash, elvish, fish, powershell or zsh' -r -f -a "bash\t''
    elvish\t''
    fish\t''
    powershell\t''
    zsh\t''"
    complete -c qwenlora-keys -l all -d 'also list every tensor, and what it is taken for'
    complete -c qwenlora-keys -l map -d 'also draw where the file acts, and how strongly'
    complete -c qwenlora-keys -l json -d 'one JSON object per file, one per line (schema 1)'
    complete -c qwenlora-keys -s h -l help -d 'this text'
    complete -c qwenlora-keys -s V -l version -d 'the version'
    "#);
}

/// What bash offers after these words.
fn bash_offers(line: &str) -> Option<String> {
    let folder = Folder::new();
    let path = folder.join("completions.bash");
    std::fs::write(&path, script("bash")).unwrap();
    let program = r#"
        source "$1" || exit 1
        COMP_WORDS=($2); [[ $2 == *" " ]] && COMP_WORDS+=("")
        COMP_CWORD=$((${#COMP_WORDS[@]} - 1))
        _qwenlora__keys qwenlora-keys "${COMP_WORDS[COMP_CWORD]}" "${COMP_WORDS[COMP_CWORD-1]}"
        echo "${COMPREPLY[@]}"
    "#;
    let output = Command::new("bash")
        .args(["-c", program, "bash"])
        .arg(path)
        .arg(line)
        .output()
        .ok()?;
    assert!(output.status.success(), "{output:?}");
    Some(String::from_utf8(output.stdout).unwrap())
}

#[test]
#[cfg(target_os = "linux")]
fn bash_obeys_the_script() {
    let offers = |line| bash_offers(line).unwrap();
    assert_eq!(offers("qwenlora-keys --color "), "auto always never\n");
    assert_eq!(offers("qwenlora-keys --col"), "--color\n");
    // No offer: bash completes the name of a file then.
    for line in [
        "qwenlora-keys ",
        "qwenlora-keys lor",
        "qwenlora-keys a ",
        "qwenlora-keys --all ",
    ] {
        assert_eq!(offers(line), "\n", "{line}");
    }
    let registered = script("bash");
    let options = registered.matches(" -o bashdefault -o default qwenlora-keys");
    assert_eq!(options.count(), 2);
    assert_eq!(
        offers("qwenlora-keys --completions "),
        "bash elvish fish powershell zsh\n"
    );
}
