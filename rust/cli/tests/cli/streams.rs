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
