//! The program `qwenlora-keys`, for `cargo install`; the wheel calls the same [`qwenlora_keys::run`].

#![forbid(unsafe_code)]

use std::env;
use std::io;
use std::process::ExitCode;

fn main() -> ExitCode {
    let (mut stdout, mut stderr) = (io::stdout().lock(), io::stderr().lock());
    let exit = qwenlora_keys::run(env::args_os().skip(1), &mut stdout, &mut stderr);
    ExitCode::from(exit.code())
}
