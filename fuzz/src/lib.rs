//! What must hold for any input whatever; one module per fuzz target.
//!
//! Each `check` panics where something does not hold. The targets call them with what libFuzzer
//! makes up; the test below calls them with the seeds, without libFuzzer and on stable Rust.

#![forbid(unsafe_code)]

pub mod adapters;
pub mod config;
pub mod file;
pub mod frame;
pub mod header;
pub mod key;
pub mod listing;
pub mod plan;
pub mod stack;
pub mod words;

/// Whether text can stand in a message as it is: a hint may follow on a line of its own.
pub(crate) fn assert_speakable(text: &str) {
    use qwenlora_core::header::is_deceptive;
    let bad = text.chars().find(|&c| c != '\n' && is_deceptive(c));
    assert!(bad.is_none(), "{bad:?} reaches a message: {text:?}");
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::path::Path;

    fn run(target: &str, check: fn(&[u8])) {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR"))
            .join("seeds")
            .join(target);
        let mut seeds = 0;
        for entry in fs::read_dir(&folder).expect("every target has seeds") {
            check(&fs::read(entry.expect("readable").path()).expect("readable"));
            seeds += 1;
        }
        assert!(seeds > 0, "{} is empty", folder.display());
    }

    #[test]
    fn seeds_of_header() {
        run("file", crate::header::check);
    }

    #[test]
    fn seeds_of_file() {
        run("file", crate::file::check);
    }

    #[test]
    fn seeds_of_key() {
        run("key", crate::key::check);
    }

    #[test]
    fn seeds_of_listing() {
        run("listing", crate::listing::check);
    }

    #[test]
    fn seeds_of_adapters() {
        run("adapters", crate::adapters::check);
    }

    #[test]
    fn seeds_of_config() {
        run("config", crate::config::check);
    }
}
