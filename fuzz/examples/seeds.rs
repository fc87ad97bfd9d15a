//! Writes `seeds/` and `dictionaries/` from the corpus of key layouts and the grammar's words.
//!
//! `cargo run --example seeds`, after a change of either. Of each layout the fewest modules stay
//! that show every combination of endings in it.

use std::collections::{HashMap, HashSet};
use std::error::Error;
use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};

use qwenlora_core::dtype::Dtype;
use qwenlora_core::model;
use qwenlora_fuzz::words::{PREFIXES, SUFFIXES};
use serde_json::{Value, json};

type Outcome<T> = Result<T, Box<dyn Error>>;

/// Modules of one combination of endings that are kept.
const KEPT_MODULES: usize = 2;
/// Sides longer than this are cut short in whole files, which carry data.
const FILE_SIDE: u64 = 4;

/// Configurations whose patterns are expressions, which no layout of the corpus has.
const CONFIGS: [&str; 5] = [
    r#"{"lora_alpha": 8, "alpha_pattern": {"to_q": null, "(img|txt)_mlp.net.2": 4, "^.*\\.to_k$": 0}}"#,
    r#"{"r": 16, "use_rslora": true, "rank_pattern": {"transformer_blocks.59.attn.to_q": 64}}"#,
    r#"{"transformer.lora_alpha": 1e3, "text_encoder.lora_alpha": 1, "alpha_pattern": {"[a-z_]+\\.\\d{1,2}": 2}}"#,
    r#"{"peft_type": "LOKR", "r": 8, "alpha": 4, "rank_pattern": {"to_(q|k)": 2}, "alpha_pattern": {"to_v": 1}}"#,
    r#"{"peft_type": "LORA", "lora_alpha": 8, "init_lora_weights": "pissa", "bias": "lora_only"}"#,
];

fn main() -> Outcome<()> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut keys = HashSet::new();
    for (name, layout) in corpus(&root.join("../tests/data/keys"))? {
        let rows = minimised(&layout);
        write(root, "listing", &name, listing(&rows, &layout).as_bytes())?;
        write(root, "file", &name, &file(&rows, &layout)?)?;
        let text = layout["metadata"]["lora_adapter_metadata"].as_str();
        if let Some(json) = text {
            write(root, "config", &name, json.as_bytes())?;
        }
        keys.extend(
            rows.iter()
                .map(|row| ending_and_prefix(text_of(row, "key"))),
        );
    }
    for (index, key) in sorted(keys).iter().enumerate() {
        write(root, "key", &format!("{index:03}"), key.as_bytes())?;
    }
    for (index, json) in CONFIGS.iter().enumerate() {
        write(root, "config", &format!("{index}"), json.as_bytes())?;
    }
    write_adapters(root)?;
    write_dictionaries(root)
}

fn write(root: &Path, target: &str, name: &str, bytes: &[u8]) -> Outcome<()> {
    let folder = root.join("seeds").join(target);
    fs::create_dir_all(&folder)?;
    Ok(fs::write(folder.join(name), bytes)?)
}

fn corpus(folder: &Path) -> Outcome<Vec<(String, Value)>> {
    let mut paths: Vec<PathBuf> = fs::read_dir(folder)?
        .map(|entry| entry.map(|e| e.path()))
        .collect::<Result<_, _>>()?;
    paths.retain(|path| path.extension().is_some_and(|e| e == "json"));
    paths.sort();
    let read = |path: &PathBuf| -> Outcome<(String, Value)> {
        let name = path
            .file_stem()
            .unwrap_or_default()
            .to_string_lossy()
            .into_owned();
        Ok((name, serde_json::from_str(&fs::read_to_string(path)?)?))
    };
    paths.iter().map(read).collect()
}

fn text_of<'v>(row: &'v Value, field: &str) -> &'v str {
    row[field].as_str().unwrap_or_default()
}

/// The key from the module's last segments on: what comes before repeats from block to block.
fn ending(key: &str) -> String {
    key.chars()
        .map(|c| if c.is_ascii_digit() { '0' } else { c })
        .collect()
}

/// A key, its block made 0, so that each form is there once.
fn ending_and_prefix(key: &str) -> String {
    let mut short = String::new();
    for part in key.split_inclusive(['.', '_']) {
        let is_number = part
            .trim_end_matches(['.', '_'])
            .parse::<u32>()
            .is_ok_and(|n| n > 2);
        short.push_str(if is_number { "0." } else { part });
    }
    short
}

/// The tensors of few modules.
fn minimised(layout: &Value) -> Vec<Value> {
    let empty = Vec::new();
    let rows = layout["tensors"].as_array().unwrap_or(&empty);
    let mut signatures: HashMap<String, usize> = HashMap::new();
    let mut kept_targets: HashSet<&str> = HashSet::new();
    let mut seen_targets: HashSet<&str> = HashSet::new();
    for target in rows.iter().map(|row| text_of(row, "target")) {
        if target.is_empty() || !seen_targets.insert(target) {
            continue;
        }
        let own = rows.iter().filter(|row| text_of(row, "target") == target);
        let mut roles: Vec<String> = own
            .map(|row| format!("{}{}", text_of(row, "role"), row["dtype"]))
            .collect();
        roles.sort();
        let count = signatures.entry(roles.join(" ")).or_default();
        *count += 1;
        if *count <= KEPT_MODULES {
            kept_targets.insert(target);
        }
    }
    let mut foreign = HashSet::new();
    let keep = |row: &&Value| {
        let target = text_of(row, "target");
        kept_targets.contains(target)
            || (target.is_empty() && foreign.insert(ending(text_of(row, "key"))))
    };
    rows.iter().filter(keep).take(64).cloned().collect()
}

fn shape(row: &Value) -> Vec<u64> {
    row["shape"]
        .as_array()
        .into_iter()
        .flatten()
        .filter_map(Value::as_u64)
        .collect()
}

fn listing(rows: &[Value], layout: &Value) -> String {
    let mut text = String::new();
    for (key, value) in layout["metadata"].as_object().into_iter().flatten() {
        let value = value.as_str().unwrap_or_default().replace('\n', " ");
        let _ = writeln!(text, "#{key}\t{value}");
    }
    for row in rows {
        let sides: Vec<String> = shape(row).iter().map(u64::to_string).collect();
        let value = match &row["value"] {
            Value::Null => String::new(),
            Value::String(text) => format!("\t{text}"),
            number => format!("\t{number}"),
        };
        let (key, dtype) = (text_of(row, "key"), text_of(row, "dtype"));
        let _ = writeln!(text, "{key}\t{dtype}\t{}{value}", sides.join("x"));
    }
    text
}

/// A whole file of the same keys, small and full of zeros.
fn file(rows: &[Value], layout: &Value) -> Outcome<Vec<u8>> {
    let mut header = serde_json::Map::new();
    if layout["metadata"]
        .as_object()
        .is_some_and(|map| !map.is_empty())
    {
        header.insert("__metadata__".to_owned(), layout["metadata"].clone());
    }
    let mut end = 0;
    for row in rows {
        let shape: Vec<u64> = shape(row)
            .iter()
            .map(|side| (*side).min(FILE_SIDE))
            .collect();
        let dtype = Dtype::parse(text_of(row, "dtype")).ok_or("an unknown dtype")?;
        let begin = end;
        end += shape.iter().product::<u64>() * dtype.bits() / 8;
        let entry = json!({"dtype": dtype.name(), "shape": shape, "data_offsets": [begin, end]});
        header.insert(text_of(row, "key").to_owned(), entry);
    }
    let text = serde_json::to_string(&header)?;
    let mut file = (text.len() as u64).to_le_bytes().to_vec();
    file.extend(text.bytes());
    file.resize(file.len() + usize::try_from(end)?, 0);
    Ok(file)
}

/// Choices are bytes: any will do, the same each time.
fn write_adapters(root: &Path) -> Outcome<()> {
    let mut state = 1_u64;
    for index in 0..24 {
        let bytes: Vec<u8> = (0..256)
            .map(|_| {
                state = state
                    .wrapping_mul(6_364_136_223_846_793_005)
                    .wrapping_add(1);
                state.to_be_bytes()[0]
            })
            .collect();
        write(root, "adapters", &format!("{index:02}"), &bytes)?;
    }
    Ok(())
}

fn write_dictionaries(root: &Path) -> Outcome<()> {
    let paths = model::table()
        .modules()
        .iter()
        .map(|target| target.path.as_str());
    let mut words: HashSet<String> = paths
        .flat_map(|path| path.split('.'))
        .chain(PREFIXES)
        .chain(SUFFIXES)
        .filter(|word| word.parse::<u32>().is_err())
        .map(str::to_owned)
        .collect();
    words.extend(Dtype::ALL.iter().map(|dtype| dtype.name().to_owned()));
    words.extend(
        [
            "transformer_blocks.59.",
            "transformer_blocks.60.",
            "layers.29.",
        ]
        .map(str::to_owned),
    );
    words.extend(["\t16x3072", "\t3072x16", "\t3072x3072", "\t\t", "\n#"].map(str::to_owned));
    words.remove("");
    let mut text = String::from("# The grammar's words; written by `cargo run --example seeds`.\n");
    for word in sorted(words) {
        text.push_str(&quoted(&word));
    }
    fs::create_dir_all(root.join("dictionaries"))?;
    fs::write(root.join("dictionaries/keys.dict"), text)?;
    let header = [
        "__metadata__",
        "\"dtype\":",
        "\"shape\":[",
        "\"data_offsets\":[",
        "[0,4]",
        "[0,0]",
        "null",
        "{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[0,4]}",
        "\\u0000",
        "\\ud800",
        "1e9",
        "18446744073709551615",
        "9223372036854775808",
        "\"__metadata__\":{\"format\":\"pt\"}",
        "lora_adapter_metadata",
        "ss_network_alpha",
        "ss_network_dim",
        "ss_base_model_version",
    ];
    let mut text = String::from("# Members of a header; written by `cargo run --example seeds`.\n");
    let dtypes = Dtype::ALL.map(|dtype| format!("\"{dtype}\""));
    for word in header.into_iter().chain(dtypes.iter().map(String::as_str)) {
        text.push_str(&quoted(word));
    }
    for word in SUFFIXES {
        text.push_str(&quoted(word));
    }
    fs::write(root.join("dictionaries/header.dict"), text)?;
    let config = [
        "\"lora_alpha\":",
        "\"transformer.lora_alpha\":",
        "\"peft_type\":\"LOKR\"",
        "\"peft_type\":\"LOHA\"",
        "\"alpha\":",
        "\"init_lora_weights\":\"pissa\"",
        "\"bias\":\"all\"",
        "\"alpha_pattern\":{",
        "\"rank_pattern\":{",
        "\"transformer.alpha_pattern\":{",
        "\"use_rslora\":true",
        "\"r\":",
        "null",
        "1e308",
        "-0.0",
        "to_q",
        "attn",
        "transformer_blocks",
        "\\\\d+",
        "(to_q|to_k)",
        "(?:",
        "(?i)",
        "[a-z]",
        "{1,9}",
        "^",
        "$",
        ".*",
        "\\\\.",
        "\\\\b",
        "\\u0000",
        "|",
        "*?",
    ];
    let mut text =
        String::from("# A configuration's words; written by `cargo run --example seeds`.\n");
    for word in config {
        text.push_str(&quoted(word));
    }
    Ok(fs::write(root.join("dictionaries/config.dict"), text)?)
}

/// A line of a libFuzzer dictionary.
fn quoted(word: &str) -> String {
    let mut line = String::from("\"");
    for byte in word.bytes() {
        match byte {
            b'"' | b'\\' => {
                line.push('\\');
                line.push(char::from(byte));
            }
            b' '..=b'~' => line.push(char::from(byte)),
            _ => {
                let _ = write!(line, "\\x{byte:02X}");
            }
        }
    }
    line + "\"\n"
}

fn sorted(words: HashSet<String>) -> Vec<String> {
    let mut words: Vec<String> = words.into_iter().collect();
    words.sort();
    words
}
