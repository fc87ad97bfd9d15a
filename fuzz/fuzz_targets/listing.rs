#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| qwenlora_fuzz::listing::check(bytes));
