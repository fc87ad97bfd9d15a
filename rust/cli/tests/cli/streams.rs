//! Streams that end early, and the program as a process.

use std::io::{self, ErrorKind, Write};
use std::process::{Command, Stdio};

use qwenlora_keys::Exit;

use crate::Folder;
use crate::lora_file;

/// A stream that fails so.
struct Failing(ErrorKind);

impl Write for Failing {
    fn write(&mut self, _: &[u8]) -> io::Result<usize> {
        Err(self.0.into())
    }

    fn flush(&mut self) -> io::Result<()> {
        Err(self.0.into())
    }
}

fn run_into(kind: ErrorKind, args: &[&str]) -> (Exit, String) {
    let mut stderr = Vec::new();
    let exit = qwenlora_keys::run(args, &mut Failing(kind), &mut stderr);
    (exit, String::from_utf8(stderr).unwrap())
}

#[test]
fn a_broken_pipe_ends_quietly() {
    let folder = Folder::new();
    let path = lora_file::flux().write(folder.join("flux.safetensors"));
    let path = path.to_str().unwrap();
    for args in [
        &[path, path] as &[&str],
        &["--json", path],
        &["--all", path],
        &[path, path, path, path],
        &["--explain", "img_in.alpha"],
        &["--completions", "zsh"],
        &["--help"],
    ] {
        assert_eq!(
            run_into(ErrorKind::BrokenPipe, args),
            (Exit::Applies, String::new())
        );
    }
}

#[test]
fn a_full_disk_does_not() {
    let folder = Folder::new();
    let path = lora_file::clean().write(folder.join("clean.safetensors"));
    let (exit, stderr) = run_into(ErrorKind::StorageFull, &[path.to_str().unwrap()]);
    assert_eq!((exit, exit.code()), (Exit::Unwritable, 74));
    assert!(
        stderr.starts_with("error: cannot write the report: "),
        "{stderr}"
    );
}

#[test]
fn nobody_listens_to_the_talk() {
    let mut stdout = Vec::new();
    let exit = qwenlora_keys::run(["--nonsense"], &mut stdout, &mut Failing(ErrorKind::Other));
    assert_eq!((exit, stdout.len()), (Exit::Usage, 0));
}

#[test]
fn the_program() {
    let folder = Folder::new();
    let path = lora_file::partial().write(folder.join("partial.safetensors"));
    let program = || Command::new(env!("CARGO_BIN_EXE_qwenlora-keys"));
    let output = program()
        .arg(&path)
        .env_remove("NO_COLOR")
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(1));
    // Captured output is no terminal, so it carries no colour.
    assert!(output.stdout.starts_with(b"PARTIAL      "));

    // A pipe whose reader is gone before the first byte.
    let (reader, writer) = io::pipe().unwrap();
    drop(reader);
    let mut child = program()
        .args(["--all".as_ref(), path.as_os_str()])
        .stdout(writer)
        .stderr(Stdio::piped())
        .spawn();
    let output = child.as_mut().map(|_| ()).map_err(|e| e.kind());
    assert_eq!(output, Ok(()));
    let output = child.unwrap().wait_with_output().unwrap();
    assert_eq!((output.status.code(), output.stderr), (Some(0), Vec::new()));
}

fn program(path: &std::path::Path) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_qwenlora-keys"));
    command
        .arg(path)
        .env_remove("COLUMNS")
        .env_remove("NO_COLOR");
    command
}

/// A folder whose table is wider than anything that it is shown on.
fn long_names() -> Folder {
    let folder = Folder::new();
    for end in ["a", "b"] {
        let name = format!("{}{end}.safetensors", "name".repeat(40));
        lora_file::clean().write(folder.join(&name));
    }
    folder
}

#[test]
fn columns_set_the_width_of_a_table() {
    let folder = long_names();
    for (columns, width) in [("100", 100), ("0", 80), ("wide", 80), ("", 80), ("5", 60)] {
        let output = program(folder.path())
            .env("COLUMNS", columns)
            .output()
            .unwrap();
        let table = String::from_utf8(output.stdout).unwrap();
        let widest = table
            .lines()
            .map(|line| line.chars().count())
            .max()
            .unwrap();
        assert!(
            widest <= width && widest > width - 12,
            "COLUMNS={columns}: {widest}\n{table}"
        );
    }
}

/// What a terminal is sent; none where the machine cannot play one.
#[cfg(target_os = "linux")]
fn on_a_terminal(arguments: &str, environment: &[(&str, &str)]) -> Option<String> {
    let line = format!("{} {arguments}", env!("CARGO_BIN_EXE_qwenlora-keys"));
    let output = Command::new("script")
        .args([
            "-qec",
            &format!("stty cols 100 2>/dev/null; {line}"),
            "/dev/null",
        ])
        .env_remove("COLUMNS")
        .env_remove("NO_COLOR")
        .env("TERM", "xterm")
        .envs(environment.iter().copied())
        .stdin(Stdio::null())
        .output()
        .ok()?;
    Some(String::from_utf8_lossy(&output.stdout).into_owned())
}

#[test]
#[cfg(target_os = "linux")]
fn a_terminal_has_colour_and_a_width() {
    let folder = long_names();
    let path = folder.path().to_str().unwrap();
    let Some(text) = on_a_terminal(path, &[]) else {
        return;
    };
    assert!(text.contains("\x1b[2mVERDICT  FILE"), "{text:?}");
    assert!(text.contains("\x1b[1;32mAPPLY\x1b[0m"), "{text:?}");
    let title = text.lines().next().unwrap().trim_end().chars().count();
    assert!((88..=108).contains(&title), "{title}: {text}");
    for environment in [("NO_COLOR", "1"), ("TERM", "dumb")] {
        let text = on_a_terminal(path, &[environment]).unwrap();
        assert!(!text.contains('\x1b') && text.contains("APPLY"), "{text:?}");
    }
    // Whoever sets it to nothing has not set it.
    assert!(
        on_a_terminal(path, &[("NO_COLOR", "")])
            .unwrap()
            .contains('\x1b')
    );
}

#[test]
#[cfg(unix)]
fn closed_streams() {
    let folder = Folder::new();
    let path = lora_file::partial().write(folder.join("partial.safetensors"));
    let run = |redirections: &str| {
        let line = format!("exec \"$0\" \"$1\" {redirections}");
        Command::new("sh")
            .args(["-c", &line, env!("CARGO_BIN_EXE_qwenlora-keys")])
            .arg(&path)
            .output()
            .unwrap()
    };
    for redirections in [">&-", "2>&-", ">&- 2>&-", "<&- >&- 2>&-"] {
        let output = run(redirections);
        assert_eq!(output.status.code(), Some(1), "{redirections}: {output:?}");
        assert!(output.stderr.is_empty(), "{redirections}: {output:?}");
    }
    if cfg!(target_os = "linux") {
        let output = run(">/dev/full");
        assert_eq!(output.status.code(), Some(74), "{output:?}");
        assert!(
            output
                .stderr
                .starts_with(b"error: cannot write the report: ")
        );
    }
}
