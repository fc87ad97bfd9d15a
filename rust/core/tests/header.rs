//! What a header may not be: every field against every kind of violation, with the exact message.
//!
//! One test per field, one line per violation. Add a case to the test of its field.

use insta::assert_snapshot;
use qwenlora_core::dtype::Dtype;
use qwenlora_core::header::{
    Header, HeaderError, MAX_HEADER_BYTES, MAX_NAME_BYTES, MAX_TENSORS, TensorFault,
};

/// A file of this header text and `data_len_bytes` zeros.
fn file(header: impl AsRef<[u8]>, data_len_bytes: usize) -> Vec<u8> {
    let header = header.as_ref();
    let mut file = (header.len() as u64).to_le_bytes().to_vec();
    file.extend(header);
    file.resize(file.len() + data_len_bytes, 0);
    file
}

fn read(file: &[u8]) -> Result<Header, HeaderError> {
    Header::read(&mut &file[..], file.len() as u64)
}

/// The message that `file` is refused with.
fn refusal(file: &[u8]) -> String {
    read(file)
        .expect_err("the file must be refused")
        .to_string()
}

/// The message for a header text in front of eight data bytes.
fn text_refusal(header: &str) -> String {
    refusal(&file(header, 8))
}

/// The message for a lone tensor of this entry in front of eight data bytes.
fn entry_refusal(entry: &str) -> String {
    text_refusal(&format!(r#"{{"a.lora_down.weight":{entry}}}"#))
}

fn dtype_refusal(dtype: &str) -> String {
    entry_refusal(&format!(
        r#"{{"dtype":{dtype},"shape":[2],"data_offsets":[0,8]}}"#
    ))
}

fn shape_refusal(shape: &str) -> String {
    entry_refusal(&format!(
        r#"{{"dtype":"F32","shape":{shape},"data_offsets":[0,8]}}"#
    ))
}

fn offsets_refusal(offsets: &str) -> String {
    entry_refusal(&format!(
        r#"{{"dtype":"F32","shape":[2],"data_offsets":{offsets}}}"#
    ))
}

fn metadata_refusal(metadata: &str) -> String {
    text_refusal(&format!(r#"{{"__metadata__":{metadata}}}"#))
}

/// The message for byte tensors of these names and offsets in front of eight data bytes.
fn layout_refusal(tensors: &[(&str, u64, u64)]) -> String {
    let entries: Vec<String> = tensors
        .iter()
        .map(|&(name, begin, end)| bytes_entry(name, begin, end))
        .collect();
    text_refusal(&format!("{{{}}}", entries.join(",")))
}

fn bytes_entry(name: &str, begin: u64, end: u64) -> String {
    let len = end.saturating_sub(begin);
    format!(r#""{name}":{{"dtype":"U8","shape":[{len}],"data_offsets":[{begin},{end}]}}"#)
}

const GOOD: &str = r#"{"dtype":"F32","shape":[2],"data_offsets":[0,8]}"#;

#[test]
fn a_header_is_read() {
    let text = r#"{"z":{"data_offsets":[8,12],"shape":[2],"dtype":"BF16"},"__metadata__":{"ss_b":"1","ss_a":"é\n"},"a\u002eb":{"dtype":"F16","shape":[2,2],"data_offsets":[0,8],"note":[{"x":null}]},"s":{"dtype":"I64","shape":[],"data_offsets":[12,20]},"none":{"dtype":"U8","shape":[0,3],"data_offsets":[8,8]}} "#;
    let header = read(&file(text, 20)).unwrap();
    let data_start = 8 + text.len() as u64;
    assert_eq!(header.data_start(), data_start);
    let metadata = [("ss_b", "1"), ("ss_a", "é\n")].map(|(key, value)| (key.into(), value.into()));
    assert_eq!(header.metadata(), metadata);
    let found: Vec<_> = header
        .tensors()
        .iter()
        .map(|t| {
            (
                t.name(),
                t.dtype(),
                t.shape(),
                t.offset_bytes() - data_start,
                t.len_bytes(),
                t.elements(),
            )
        })
        .collect();
    assert_eq!(
        found,
        [
            ("z", Dtype::BF16, &[2][..], 8, 4, 2),
            ("a.b", Dtype::F16, &[2, 2][..], 0, 8, 4),
            ("s", Dtype::I64, &[][..], 12, 8, 1),
            ("none", Dtype::U8, &[0, 3][..], 8, 0, 0),
        ]
    );
}

#[test]
fn a_file_without_tensors_is_read() {
    let header = read(&file("{}", 0)).unwrap();
    assert!(header.tensors().is_empty());
    assert!(header.metadata().is_empty());
}

#[test]
fn dtypes_are_those_of_the_format() {
    for dtype in Dtype::ALL {
        assert_eq!(Dtype::parse(dtype.name()), Some(dtype));
        assert_eq!(serde_json::to_value(dtype).unwrap(), dtype.to_string());
        // Eight elements fill whole bytes whatever their width.
        let len = dtype.bits();
        let text = format!(r#"{{"a":{{"dtype":"{dtype}","shape":[8],"data_offsets":[0,{len}]}}}}"#);
        let bytes = file(text, usize::try_from(len).unwrap());
        assert_eq!(read(&bytes).unwrap().tensors()[0].dtype(), dtype);
        assert!(
            safetensors::SafeTensors::deserialize(&bytes).is_ok(),
            "{dtype}"
        );
    }
    assert_eq!(Dtype::parse("f32"), None);
}

#[test]
fn other_formats_are_recognised() {
    assert_snapshot!(refusal(b""), @r"
    the file is empty
    hint: a download or a save did not finish; get the file again
    ");
    assert_snapshot!(refusal(&zip_start("archive/data.pkl")), @r#"
    the file is a PyTorch pickle, not safetensors; a pickle can run any code while it loads
    hint: convert it once: `python -c "import torch, safetensors.torch as st; st.save_file(torch.load('lora.pt', weights_only=True), 'lora.safetensors')"`
    "#);
    for pickle in [
        b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19.".as_slice(),
        b"\x80\x04\x95\x2c\x00\x00\x00\x00\x00\x00\x00\x8c",
        b"\x80\x05}\x94.\x00\x00\x00",
    ] {
        assert!(matches!(read(pickle), Err(HeaderError::Pickle)));
    }
    assert_snapshot!(refusal(b"<!DOCTYPE html><html><head>"), @r"
    the file is a web page, not safetensors
    hint: the site sent a page in place of the file, often to ask for a login; download the file itself
    ");
    for page in [
        "\u{feff}<HTML lang=en>",
        "\r\n\n  <!doctype html>",
        "<?xml version='1.0'?>",
        "<head><title>",
    ] {
        assert!(
            matches!(read(page.as_bytes()), Err(HeaderError::Html)),
            "{page}"
        );
    }
    assert_snapshot!(refusal(b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12\n"), @r"
    the file is a git LFS pointer, not the file it stands for
    hint: run `git lfs pull` where it was cloned, or download the file itself
    ");
    assert_snapshot!(refusal(b"GGUF\x03\x00\x00\x00\x00\x00\x00\x00"), @r"
    the file is a GGUF model, not safetensors
    hint: a LoRA comes as `.safetensors`; a GGUF file belongs to a GGUF model loader
    ");
    assert_snapshot!(refusal(b"{\"error\":\"Unauthorized\",\"message\":\"sign in\"}"), @r#"
    the file is JSON text, not safetensors: `{"error":"Unauthorized","message":"sign in"}`
    hint: a site's error message, or an index or configuration that belongs beside the file; download the file itself
    "#);
    assert_snapshot!(refusal(b"\x00\x05\x16\x07\x00\x02\x00\x00Mac OS X        "), @r"
    the file holds macOS attributes only
    hint: use the file of the same name without the leading `._`
    ");
    assert_snapshot!(refusal(&[0; 64]), @r"
    the header length is zero
    hint: a file of zeros is what an interrupted download leaves; get the file again
    ");
}

/// How a zip archive begins whose first member has this name.
fn zip_start(name: &str) -> Vec<u8> {
    let mut bytes = b"PK\x03\x04".to_vec();
    bytes.extend([0; 22]);
    bytes.extend(u16::try_from(name.len()).expect("short").to_le_bytes());
    bytes.extend([0; 2]);
    bytes.extend(name.as_bytes());
    bytes
}

#[test]
fn archives_are_called_so() {
    assert_snapshot!(refusal(&zip_start("loras/style.safetensors")), @"
    the file is a zip archive, not safetensors: it holds `loras/style.safetensors`
    hint: unpack it, and use the file that it holds
    ");
    assert_snapshot!(refusal(&zip_start("read me.txt")), @"
    the file is a zip archive, not safetensors
    hint: unpack it, and look for a `.safetensors` file in it
    ");
    // Without a whole name nothing says that it is a pickle.
    for zip in [
        b"PK\x03\x04".as_slice(),
        b"PK\x05\x06\0\0\0\0\0\0",
        &[b'P', b'K', 3, 4, 9],
    ] {
        assert!(matches!(read(zip), Err(HeaderError::Zip { holds: None })));
    }
    // `data.pkl` stands in a folder, as `torch.save` puts it there.
    assert!(matches!(
        read(&zip_start("data.pkl")),
        Err(HeaderError::Zip { .. })
    ));
    assert_snapshot!(refusal(b"7z\xbc\xaf\x27\x1c\x00\x04aaaaaaaa"), @"
    the file is a 7z archive, not safetensors
    hint: unpack it, and look for a `.safetensors` file in it
    ");
    let mut tar = b"style.safetensors".to_vec();
    tar.resize(257, 0);
    tar.extend(b"ustar\x0000");
    for (archive, expected) in [
        (b"Rar!\x1a\x07\x00\xcf\x90\x73".to_vec(), "rar"),
        (b"Rar!\x1a\x07\x01\x00".to_vec(), "rar"),
        (b"\x1f\x8b\x08\x08\x12\x34\x56\x78\x00\x03".to_vec(), "gzip"),
        (b"\xfd7zXZ\x00\x00\x04".to_vec(), "xz"),
        (b"BZh91AY&SY".to_vec(), "bzip2"),
        (b"\x28\xb5\x2f\xfd\x24\x00\x01\x02".to_vec(), "zstd"),
        (tar, "tar"),
    ] {
        let said = refusal(&archive);
        assert!(said.contains(&format!("{expected} archive")), "{said}");
    }
}

/// Without a time in it, gzip begins as a header of 559,903 bytes does.
#[test]
fn a_gzip_archive_without_a_time_is_no_header() {
    let mut gzip = b"\x1f\x8b\x08\x00\x00\x00\x00\x00\x00\x03".to_vec();
    for len in [10, 1000, 600_000] {
        gzip.resize(len, 0xa5);
        assert!(
            matches!(read(&gzip), Err(HeaderError::Archive { .. })),
            "{len}"
        );
    }
    // A header of that length is read.
    let mut text = "{}".to_owned();
    text.extend(std::iter::repeat_n(' ', 559_903 - 2));
    assert!(read(&file(text, 0)).is_ok());
}

#[test]
fn pictures_films_and_other_weights_are_called_so() {
    assert_snapshot!(refusal(b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR"), @"
    the file is a PNG picture, not safetensors
    hint: it was saved under a LoRA's name; download the LoRA itself
    ");
    assert_snapshot!(refusal(b"\x89HDF\r\n\x1a\n\x00\x00\x00"), @"
    the file is an HDF5 file, not safetensors
    hint: a LoRA comes as `.safetensors`
    ");
    for (bytes, expected) in [
        (b"\xff\xd8\xff\xe0\x00\x10JFIF".as_slice(), "JPEG"),
        (b"RIFF\x24\x00\x00\x00WEBPVP8 ", "WebP"),
        (b"\x00\x00\x00\x20ftypisom\x00", "MP4"),
        (b"\x00\x00\x00\x20ftypavif\x00", "AVIF"),
        (b"\x1a\x45\xdf\xa3\x9f\x42\x86\x81", "WebM"),
        (b"GIF89a\x01\x00\x01\x00", "GIF"),
        (b"%PDF-1.7\n", "PDF"),
        (b"\x93NUMPY\x01\x00", "NumPy"),
    ] {
        let said = refusal(bytes);
        assert!(
            said.starts_with("the file is a") && said.contains(expected),
            "{said}"
        );
    }
}

#[test]
fn texts_are_called_so() {
    assert_snapshot!(refusal(b"Invalid username or password."), @"
    the file is plain text, not safetensors: `Invalid username or password.`
    hint: often a site's message in place of the file; download the file itself
    ");
    for text in [
        "Entry not found",
        "404",
        "error code: 1020\r\n",
        "\u{feff}zur Anmeldung n\u{f6}tig",
    ] {
        assert!(
            matches!(read(text.as_bytes()), Err(HeaderError::PlainText { .. })),
            "{text}"
        );
    }
    // The last character of what is looked at may be cut in two.
    let long = "\u{e9}".repeat(2000);
    for cut in [
        &long.as_bytes()[..1001],
        long.as_bytes(),
        &[b"a", long.as_bytes()].concat(),
    ] {
        assert!(matches!(read(cut), Err(HeaderError::PlainText { .. })));
    }
    for json in ["[\"a\"]", "{\"model_type\": \"lora\"}"] {
        assert!(matches!(
            read(json.as_bytes()),
            Err(HeaderError::JsonText { .. })
        ));
    }
    // Pickles of protocol 0 are text, too.
    assert!(matches!(
        read(b"(dp0\nVx\np1\nI1\ns."),
        Err(HeaderError::Pickle)
    ));
    // A byte, and bytes that are no text.
    for other in [
        b"\n".as_slice(),
        b"a",
        b"a\x00b\x01cdefghi",
        b"\xff\xfe<\x00h\x00t\x00m\x00",
    ] {
        let said = refusal(other);
        assert!(!said.contains("text"), "{said}");
    }
}

/// `\x80\x02` and `<` begin headers of these lengths, too.
#[test]
fn lengths_that_look_like_other_formats_are_read() {
    for len in [
        0x80_usize + 0x200,
        0x80 + 0x300,
        usize::from(b'<'),
        0x16_0500,
    ] {
        let mut text = "{}".to_owned();
        text.extend(std::iter::repeat_n(' ', len - 2));
        assert!(read(&file(text, 0)).is_ok(), "{len}");
    }
}

#[test]
fn length() {
    assert_snapshot!(refusal(&[2, 0]), @r"
    the file is too short for a safetensors header: 2 bytes
    hint: a download or a save did not finish; get the file again
    ");
    assert_snapshot!(refusal(b"{}"), @r"
    the file is JSON text, not safetensors: `{}`
    hint: a site's error message, or an index or configuration that belongs beside the file; download the file itself
    ");
    assert_snapshot!(refusal(&3_u64.to_le_bytes()), @r"
    the header ends beyond the file: 3 bytes from byte 8 on, in a file of 8 bytes
    hint: the file is cut short or is not safetensors; get the file again
    ");
    assert_snapshot!(refusal(&[9, 0, 0, 0, 0, 0, 0, 0, b'{', b'}']), @r"
    the header ends beyond the file: 9 bytes from byte 8 on, in a file of 10 bytes
    hint: the file is cut short or is not safetensors; get the file again
    ");
    let max = usize::try_from(MAX_HEADER_BYTES).unwrap();
    assert_snapshot!(refusal(&[&(MAX_HEADER_BYTES + 1).to_le_bytes()[..], &vec![b' '; max + 1]].concat()), @r"
    the header length is over the limit of 33554432 bytes: 33554433
    hint: this is not a safetensors file, or it is damaged; get the file again
    ");
    assert_snapshot!(refusal(&[0xff; 16]), @r"
    the header length is over the limit of 33554432 bytes: 18446744073709551615
    hint: this is not a safetensors file, or it is damaged; get the file again
    ");
}

#[test]
fn a_file_shorter_than_its_length_ends() {
    let bytes = file("{}", 0);
    let cut = |len: usize| {
        Header::read(&mut &bytes[..len], 10)
            .unwrap_err()
            .to_string()
    };
    assert_snapshot!(cut(9), @r"
    the file ended at byte 9, inside the header
    hint: it changed while it was read; try again once it is complete
    ");
    assert_snapshot!(cut(3), @r"
    the file ended at byte 3, inside the header
    hint: it changed while it was read; try again once it is complete
    ");
}

#[test]
fn text() {
    assert_snapshot!(refusal(&file(b"{\"\xff\":1}", 0)), @"the header is not UTF-8 at byte 10");
    assert_snapshot!(refusal(&file(b"{\"a\xe2\x82", 0)), @"the header is not UTF-8 at byte 11");
    assert_snapshot!(text_refusal(" {}"), @"the header does not start with `{`: ` {}`");
    assert_snapshot!(text_refusal("[]"), @"the header does not start with `{`: `[]`");
    assert_snapshot!(text_refusal("\u{feff}{}"), @r#"the header does not start with `{`: `\u{feff}{}`"#);
    assert_snapshot!(text_refusal("\0\u{1b}[2J\u{202e}`"), @r#"the header does not start with `{`: `\u{0}\u{1b}[2J\u{202e}\u{60}`"#);
    assert_snapshot!(text_refusal("{"), @"the header is not valid JSON at byte 8: EOF while parsing an object, in `{`");
    assert_snapshot!(text_refusal("{} {}"), @"the header is not valid JSON at byte 11: trailing characters, in `{} {`");
    assert_snapshot!(text_refusal("{}\0"), @r#"the header is not valid JSON at byte 10: trailing characters, in `{}\u{0}`"#);
    assert_snapshot!(text_refusal(r#"{"a":1,}"#), @r#"the header is not valid JSON at byte 15: trailing comma, in `{"a":1,}`"#);
    assert_snapshot!(text_refusal("{\"a\":\n{\"dtype\":F32}}"), @r#"the header is not valid JSON at byte 23: expected value, in `{"a":\u{a}{"dtype":F`"#);
    assert_snapshot!(text_refusal("{'a':1}"), @"the header is not valid JSON at byte 9: key must be a string, in `{'`");
    assert_snapshot!(text_refusal(r#"{"a":NaN}"#), @r#"the header is not valid JSON at byte 13: expected value, in `{"a":N`"#);
    assert_snapshot!(text_refusal(r#"{"a":{"note":1e999}}"#), @r#"the header is not valid JSON at byte 25: number out of range, in `{"a":{"note":1e999`"#);
    assert_snapshot!(text_refusal(r#"{"a":{"note":"\ud800"}}"#), @r#"the header is not valid JSON at byte 28: unexpected end of hex escape, in `{"a":{"note":"\ud800"`"#);
    assert_snapshot!(text_refusal("{\"a\":\"\u{1}\"}"), @r#"the header is not valid JSON at byte 14: control character (\u0000-\u001F) found while parsing a string, in `{"a":"\u{1}`"#);
    assert_snapshot!(text_refusal(&format!(r#"{{"a":{}"#, "[".repeat(200))), @"the header is not valid JSON at byte 139: recursion limit exceeded, in `[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[`");
}

#[test]
fn name() {
    assert_snapshot!(text_refusal(&format!(r#"{{"a":{GOOD},"b":{GOOD},"a":{GOOD}}}"#)), @"the header names tensor `a` twice");
    assert_snapshot!(text_refusal(&format!(r#"{{"a":{GOOD},"\u0061":{GOOD}}}"#)), @"the header names tensor `a` twice");
    let name = "n".repeat(MAX_NAME_BYTES + 1);
    assert_snapshot!(text_refusal(&format!(r#"{{"{name}":{GOOD}}}"#)), @"tensor `nnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnn…nnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnn` (1025 bytes): the name is over the limit of 1024 bytes: 1025");
    assert!(read(&file(format!(r#"{{"{}":{GOOD}}}"#, &name[1..]), 8)).is_ok());
    assert!(read(&file(format!(r#"{{"":{GOOD}}}"#), 8)).is_ok());
    assert_snapshot!(text_refusal(r"{1:{}}"), @"the header is not valid JSON at byte 9: key must be a string, in `{1`");
    // A name that would clear the screen, write right to left, and close its quotes.
    assert_snapshot!(text_refusal(r#"{"\u001b[2J\u202e`\u200b\r\n":0}"#), @r#"tensor `\u{1b}[2J\u{202e}\u{60}\u{200b}\u{d}\u{a}`: the entry is not an object: `0`"#);
}

#[test]
fn count() {
    let entries: Vec<String> = (0..=MAX_TENSORS)
        .map(|index| bytes_entry(&format!("t{index}"), 0, 0))
        .collect();
    let header =
        |count: usize| format!(r#"{{"__metadata__":{{}},{}}}"#, entries[..count].join(","));
    assert_eq!(
        read(&file(header(MAX_TENSORS), 0)).unwrap().tensors().len(),
        MAX_TENSORS
    );
    assert_snapshot!(refusal(&file(header(MAX_TENSORS + 1), 0)), @"the header names too many tensors, over the limit of 65536: 65537");
    let without_metadata = format!("{{{}}}", entries.join(","));
    assert!(matches!(
        read(&file(without_metadata, 0)),
        Err(HeaderError::TooManyTensors { count, .. }) if count == MAX_TENSORS + 1
    ));
}

#[test]
fn entry() {
    assert_snapshot!(entry_refusal("null"), @"tensor `a.lora_down.weight`: the entry is not an object: `null`");
    assert_snapshot!(entry_refusal("7"), @"tensor `a.lora_down.weight`: the entry is not an object: `7`");
    assert_snapshot!(entry_refusal("true"), @"tensor `a.lora_down.weight`: the entry is not an object: `true`");
    assert_snapshot!(entry_refusal(r#""F32""#), @r#"tensor `a.lora_down.weight`: the entry is not an object: `"F32"`"#);
    assert_snapshot!(entry_refusal(r#"["F32",[2],[0,8]]"#), @r#"tensor `a.lora_down.weight`: the entry is not an object: `["F32",[2],[0,8]]`"#);
    assert_snapshot!(entry_refusal("{}"), @"tensor `a.lora_down.weight`: field `dtype` is missing");
    assert_snapshot!(entry_refusal(r#"{"shape":[2],"data_offsets":[0,8]}"#), @"tensor `a.lora_down.weight`: field `dtype` is missing");
    assert_snapshot!(entry_refusal(r#"{"dtype":"F32","data_offsets":[0,8]}"#), @"tensor `a.lora_down.weight`: field `shape` is missing");
    assert_snapshot!(entry_refusal(r#"{"dtype":"F32","shape":[2]}"#), @"tensor `a.lora_down.weight`: field `data_offsets` is missing");
    assert_snapshot!(entry_refusal(r#"{"DTYPE":"F32","shape":[2],"data_offsets":[0,8]}"#), @"tensor `a.lora_down.weight`: field `dtype` is missing");
    assert_snapshot!(entry_refusal(r#"{"dtype":"F32","dtype":"F32","shape":[2],"data_offsets":[0,8]}"#), @"tensor `a.lora_down.weight`: field `dtype` stands twice");
    assert_snapshot!(entry_refusal(r#"{"dtype":"F32","shape":[2],"shape":[2],"data_offsets":[0,8]}"#), @"tensor `a.lora_down.weight`: field `shape` stands twice");
    assert_snapshot!(entry_refusal(r#"{"dtype":"F32","shape":[2],"data_offsets":[0,8],"data_offsets":[0,8]}"#), @"tensor `a.lora_down.weight`: field `data_offsets` stands twice");
    assert_snapshot!(entry_refusal(r#"{"dtype":"F32","shape":[2],"data_\u006fffsets":[0,8],"data_offsets":[0,8]}"#), @"tensor `a.lora_down.weight`: field `data_offsets` stands twice");
    let fields = r#","x":0"#.repeat(62);
    assert_snapshot!(entry_refusal(&format!("{}{fields}}}", GOOD.trim_end_matches('}'))), @"tensor `a.lora_down.weight`: the entry has too many fields, over the limit of 64: 65");
}

#[test]
fn dtype() {
    assert_snapshot!(dtype_refusal("null"), @"tensor `a.lora_down.weight`: `dtype` is not a string: `null`");
    assert_snapshot!(dtype_refusal("32"), @"tensor `a.lora_down.weight`: `dtype` is not a string: `32`");
    assert_snapshot!(dtype_refusal("true"), @"tensor `a.lora_down.weight`: `dtype` is not a string: `true`");
    assert_snapshot!(dtype_refusal(r#"["F32"]"#), @r#"tensor `a.lora_down.weight`: `dtype` is not a string: `["F32"]`"#);
    assert_snapshot!(dtype_refusal(r#"{"F32":null}"#), @r#"tensor `a.lora_down.weight`: `dtype` is not a string: `{"F32":null}`"#);
    assert_snapshot!(dtype_refusal(r#""""#), @"tensor `a.lora_down.weight`: unknown dtype: ``");
    assert_snapshot!(dtype_refusal(r#""f32""#), @"tensor `a.lora_down.weight`: unknown dtype: `f32`");
    assert_snapshot!(dtype_refusal(r#""F32 ""#), @"tensor `a.lora_down.weight`: unknown dtype: `F32 `");
    assert_snapshot!(dtype_refusal(r#""torch.float32""#), @"tensor `a.lora_down.weight`: unknown dtype: `torch.float32`");
    assert_snapshot!(dtype_refusal(r#""F\u001b32""#), @r#"tensor `a.lora_down.weight`: unknown dtype: `F\u{1b}32`"#);
    assert_snapshot!(dtype_refusal(&format!(r#""{}""#, "F".repeat(5000))), @"tensor `a.lora_down.weight`: unknown dtype: `FFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFF…FFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFF` (5000 bytes)");
    // Right in itself, but not with the rest.
    assert_snapshot!(dtype_refusal(r#""F16""#), @"tensor `a.lora_down.weight`: the data is 8 bytes, but F16 [2] needs 4");
    assert_snapshot!(dtype_refusal(r#""F6_E3M2""#), @"tensor `a.lora_down.weight`: the elements do not fill whole bytes: F6_E3M2 [2] is 12 bits");
}

#[test]
fn shape() {
    assert_snapshot!(shape_refusal("null"), @"tensor `a.lora_down.weight`: `shape` is not an array: `null`");
    assert_snapshot!(shape_refusal("2"), @"tensor `a.lora_down.weight`: `shape` is not an array: `2`");
    assert_snapshot!(shape_refusal("true"), @"tensor `a.lora_down.weight`: `shape` is not an array: `true`");
    assert_snapshot!(shape_refusal(r#""2""#), @r#"tensor `a.lora_down.weight`: `shape` is not an array: `"2"`"#);
    assert_snapshot!(shape_refusal(r#"{"0":2}"#), @r#"tensor `a.lora_down.weight`: `shape` is not an array: `{"0":2}`"#);
    assert_snapshot!(shape_refusal("[-2]"), @"tensor `a.lora_down.weight`: `shape` holds something else than a whole number from 0 to 2^64 - 1: `-2`");
    assert_snapshot!(shape_refusal("[-0]"), @"tensor `a.lora_down.weight`: `shape` holds something else than a whole number from 0 to 2^64 - 1: `-0`");
    assert_snapshot!(shape_refusal("[2.0]"), @"tensor `a.lora_down.weight`: `shape` holds something else than a whole number from 0 to 2^64 - 1: `2.0`");
    assert_snapshot!(shape_refusal("[2e0]"), @"tensor `a.lora_down.weight`: `shape` holds something else than a whole number from 0 to 2^64 - 1: `2e0`");
    assert_snapshot!(shape_refusal("[18446744073709551616]"), @"tensor `a.lora_down.weight`: `shape` holds something else than a whole number from 0 to 2^64 - 1: `18446744073709551616`");
    assert_snapshot!(shape_refusal(&format!("[{}]", "9".repeat(300))), @"tensor `a.lora_down.weight`: `shape` holds something else than a whole number from 0 to 2^64 - 1: `99999999999999999999999999999999999999999999999999999999…99999999999999999999999999999999` (300 bytes)");
    assert_snapshot!(shape_refusal("[2,null]"), @"tensor `a.lora_down.weight`: `shape` holds something else than a whole number from 0 to 2^64 - 1: `null`");
    assert_snapshot!(shape_refusal(r#"["2"]"#), @r#"tensor `a.lora_down.weight`: `shape` holds something else than a whole number from 0 to 2^64 - 1: `"2"`"#);
    assert_snapshot!(shape_refusal("[[2]]"), @"tensor `a.lora_down.weight`: `shape` holds something else than a whole number from 0 to 2^64 - 1: `[2]`");
    assert_snapshot!(shape_refusal("[02]"), @r#"the header is not valid JSON at byte 55: invalid number, in `{"a.lora_down.weight":{"dtype":"F32","shape":[02`"#);
    assert_snapshot!(shape_refusal("[+2]"), @r#"the header is not valid JSON at byte 54: expected value, in `{"a.lora_down.weight":{"dtype":"F32","shape":[+`"#);
    assert_snapshot!(shape_refusal("[2,1,1,1,1,1,1,1,1]"), @"tensor `a.lora_down.weight`: `shape` has too many dimensions, over the limit of 8: 9");
    assert_snapshot!(shape_refusal("[4294967296,4294967296]"), @"tensor `a.lora_down.weight`: the size overflows 64 bits: F32 [4294967296, 4294967296]");
    assert_snapshot!(shape_refusal("[9223372036854775807]"), @"tensor `a.lora_down.weight`: the size overflows 64 bits: F32 [9223372036854775807]");
    assert_snapshot!(shape_refusal("[4294967296,4294967296,0]"), @"tensor `a.lora_down.weight`: the size overflows 64 bits: F32 [4294967296, 4294967296, 0]");
    assert_snapshot!(shape_refusal("[]"), @"tensor `a.lora_down.weight`: the data is 8 bytes, but F32 [] needs 4");
    assert_snapshot!(shape_refusal("[0]"), @"tensor `a.lora_down.weight`: the data is 8 bytes, but F32 [0] needs 0");
    assert_snapshot!(shape_refusal("[1]"), @"tensor `a.lora_down.weight`: the data is 8 bytes, but F32 [1] needs 4");
    assert_snapshot!(shape_refusal("[3]"), @"tensor `a.lora_down.weight`: the data is 8 bytes, but F32 [3] needs 12");
    assert!(
        read(&file(
            format!(r#"{{"a":{}}}"#, GOOD.replace("[2]", "[2,1,1,1,1,1,1,1]")),
            8
        ))
        .is_ok()
    );
}

#[test]
fn data_offsets() {
    assert_snapshot!(offsets_refusal("null"), @"tensor `a.lora_down.weight`: `data_offsets` is not an array: `null`");
    assert_snapshot!(offsets_refusal("8"), @"tensor `a.lora_down.weight`: `data_offsets` is not an array: `8`");
    assert_snapshot!(offsets_refusal("false"), @"tensor `a.lora_down.weight`: `data_offsets` is not an array: `false`");
    assert_snapshot!(offsets_refusal(r#""0,8""#), @r#"tensor `a.lora_down.weight`: `data_offsets` is not an array: `"0,8"`"#);
    assert_snapshot!(offsets_refusal(r#"{"0":0,"1":8}"#), @r#"tensor `a.lora_down.weight`: `data_offsets` is not an array: `{"0":0,"1":8}`"#);
    assert_snapshot!(offsets_refusal("[]"), @"tensor `a.lora_down.weight`: `data_offsets` does not hold two numbers: 0");
    assert_snapshot!(offsets_refusal("[0]"), @"tensor `a.lora_down.weight`: `data_offsets` does not hold two numbers: 1");
    assert_snapshot!(offsets_refusal("[0,8,8]"), @"tensor `a.lora_down.weight`: `data_offsets` does not hold two numbers: 3");
    assert_snapshot!(offsets_refusal("[-8,0]"), @"tensor `a.lora_down.weight`: `data_offsets` holds something else than a whole number from 0 to 2^64 - 1: `-8`");
    assert_snapshot!(offsets_refusal("[0,8.0]"), @"tensor `a.lora_down.weight`: `data_offsets` holds something else than a whole number from 0 to 2^64 - 1: `8.0`");
    assert_snapshot!(offsets_refusal("[0,8e0]"), @"tensor `a.lora_down.weight`: `data_offsets` holds something else than a whole number from 0 to 2^64 - 1: `8e0`");
    assert_snapshot!(offsets_refusal("[0,18446744073709551616]"), @"tensor `a.lora_down.weight`: `data_offsets` holds something else than a whole number from 0 to 2^64 - 1: `18446744073709551616`");
    assert_snapshot!(offsets_refusal(r#"["0",8]"#), @r#"tensor `a.lora_down.weight`: `data_offsets` holds something else than a whole number from 0 to 2^64 - 1: `"0"`"#);
    assert_snapshot!(offsets_refusal("[0,null]"), @"tensor `a.lora_down.weight`: `data_offsets` holds something else than a whole number from 0 to 2^64 - 1: `null`");
    assert_snapshot!(offsets_refusal("[[0],8]"), @"tensor `a.lora_down.weight`: `data_offsets` holds something else than a whole number from 0 to 2^64 - 1: `[0]`");
    assert_snapshot!(offsets_refusal("[8,0]"), @"tensor `a.lora_down.weight`: the data ends before it begins: `data_offsets` [8, 0]");
    assert_snapshot!(offsets_refusal("[0,4]"), @"tensor `a.lora_down.weight`: the data is 4 bytes, but F32 [2] needs 8");
    assert_snapshot!(offsets_refusal("[0,12]"), @"tensor `a.lora_down.weight`: the data is 12 bytes, but F32 [2] needs 8");
    assert_snapshot!(offsets_refusal("[4,12]"), @r"
    tensor `a.lora_down.weight`: the data ends beyond the file: at data byte 12 of 8
    hint: a download or a save did not finish; get the file again
    ");
    assert_snapshot!(offsets_refusal("[18446744073709551607,18446744073709551615]"), @r"
    tensor `a.lora_down.weight`: the data ends beyond the file: at data byte 18446744073709551615 of 8
    hint: a download or a save did not finish; get the file again
    ");
}

#[test]
fn layout() {
    assert_snapshot!(layout_refusal(&[]), @"data bytes 0 to 8, after the last tensor, belong to no tensor");
    assert_snapshot!(layout_refusal(&[("a", 0, 6)]), @"data bytes 6 to 8, after the last tensor, belong to no tensor");
    assert_snapshot!(layout_refusal(&[("a", 2, 8)]), @"data bytes 0 to 2, before tensor `a`, belong to no tensor");
    assert_snapshot!(layout_refusal(&[("b", 5, 8), ("a", 0, 4)]), @"data bytes 4 to 5, before tensor `b`, belong to no tensor");
    assert_snapshot!(layout_refusal(&[("b", 4, 8), ("a", 0, 5)]), @"tensor `b` begins at data byte 4, inside tensor `a`, which ends at 5");
    assert_snapshot!(layout_refusal(&[("a", 0, 8), ("b", 0, 8)]), @"tensor `b` begins at data byte 0, inside tensor `a`, which ends at 8");
    assert_snapshot!(layout_refusal(&[("a", 0, 8), ("b", 2, 4)]), @"tensor `b` begins at data byte 2, inside tensor `a`, which ends at 8");
    assert_snapshot!(layout_refusal(&[("a", 0, 8), ("empty", 4, 4)]), @"tensor `empty` begins at data byte 4, inside tensor `a`, which ends at 8");
    assert_snapshot!(layout_refusal(&[("a", 0, 8), ("empty", 9, 9)]), @r"
    tensor `empty`: the data ends beyond the file: at data byte 9 of 8
    hint: a download or a save did not finish; get the file again
    ");
    for at in [0, 4, 8] {
        let entries = [
            ("a", 0, 4),
            ("empty", at, at),
            ("b", 4, 8),
            ("none", at, at),
        ];
        let text = entries
            .map(|(name, begin, end)| bytes_entry(name, begin, end))
            .join(",");
        assert!(read(&file(format!("{{{text}}}"), 8)).is_ok(), "{at}");
    }
}

#[test]
fn metadata() {
    assert_snapshot!(metadata_refusal("null"), @"`__metadata__` is not an object: `null`");
    assert_snapshot!(metadata_refusal("1"), @"`__metadata__` is not an object: `1`");
    assert_snapshot!(metadata_refusal("true"), @"`__metadata__` is not an object: `true`");
    assert_snapshot!(metadata_refusal(r#""format""#), @r#"`__metadata__` is not an object: `"format"`"#);
    assert_snapshot!(metadata_refusal(r#"[["format","pt"]]"#), @r#"`__metadata__` is not an object: `[["format","pt"]]`"#);
    assert_snapshot!(metadata_refusal(r#"{"format":null}"#), @"`__metadata__` key `format` is not a string: `null`");
    assert_snapshot!(metadata_refusal(r#"{"ss_epoch":3}"#), @"`__metadata__` key `ss_epoch` is not a string: `3`");
    assert_snapshot!(metadata_refusal(r#"{"ss_v2":false}"#), @"`__metadata__` key `ss_v2` is not a string: `false`");
    assert_snapshot!(metadata_refusal(r#"{"ss_tags":["a"]}"#), @r#"`__metadata__` key `ss_tags` is not a string: `["a"]`"#);
    assert_snapshot!(metadata_refusal(r#"{"ss_tags":{"a":"b"}}"#), @r#"`__metadata__` key `ss_tags` is not a string: `{"a":"b"}`"#);
    assert_snapshot!(metadata_refusal(r#"{"k":"1","j":"2","k":"1"}"#), @"`__metadata__` holds key `k` twice");
    assert_snapshot!(metadata_refusal(r#"{"k":"1"},"__metadata__":{}"#), @"the header holds `__metadata__` twice");
    assert_snapshot!(metadata_refusal(r#"{"k":"1"},"\u005f_metadata__":{}"#), @"the header holds `__metadata__` twice");
    assert_snapshot!(metadata_refusal(GOOD), @"`__metadata__` key `shape` is not a string: `[2]`");
    let entries: Vec<String> = (0..=MAX_TENSORS)
        .map(|index| format!(r#""{index}":"""#))
        .collect();
    assert_snapshot!(metadata_refusal(&format!("{{{}}}", entries.join(","))), @"`__metadata__` has too many entries, over the limit of 65536: 65537");
}

/// A message must not grow with the file, whatever part of it is hostile.
#[test]
fn messages_stay_short() {
    let long = "\\u0001\u{202e}x".repeat(100_000);
    for text in [
        format!(r#"{{"{long}":0}}"#),
        format!(r#"{{"a":"{long}"}}"#),
        format!(r#"{{"a":{{"dtype":"{long}","shape":[],"data_offsets":[0,8]}}}}"#),
        format!(r#"{{"a":{{"dtype":"U8","shape":"{long}","data_offsets":[0,8]}}}}"#),
        format!(r#"{{"__metadata__":{{"{long}":["{long}"]}}}}"#),
        format!(r#"{{"__metadata__":{{"{long}":"","{long}":""}}}}"#),
        format!(r#"{{"{long}":"#),
        format!(r"!{long}"),
    ] {
        let message = text_refusal(&text);
        assert!(
            message.chars().count() < 2000,
            "{} characters",
            message.chars().count()
        );
        assert!(
            !message.contains(|c: char| c.is_control() || c == '\u{202e}'),
            "{message}"
        );
    }
}

#[test]
fn errors_carry_the_values() {
    let text = format!(r#"{{"a":{}}}"#, GOOD.replace("[0,8]", "[4,12]"));
    let Err(HeaderError::Tensor { tensor, fault }) = read(&file(text, 8)) else {
        panic!("the tensor must be refused");
    };
    assert_eq!(tensor.to_string(), "`a`");
    assert_eq!(
        fault,
        TensorFault::BeyondFile {
            end: 12,
            data_len_bytes: 8
        }
    );
}

#[test]
fn an_error_of_the_reader_is_passed_on() {
    struct Broken;
    impl std::io::Read for Broken {
        fn read(&mut self, _: &mut [u8]) -> std::io::Result<usize> {
            Err(std::io::Error::other("the drive is gone"))
        }
    }
    assert_snapshot!(Header::read(&mut Broken, 100).unwrap_err(), @"cannot read the header: the drive is gone");
}
