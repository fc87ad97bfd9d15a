//! Open files: identity, change while open, values, and parallel reads.

#![expect(clippy::unwrap_used, reason = "the helpers belong to the tests")]

use std::collections::HashSet;
use std::fs::{self, File};
use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use insta::assert_snapshot;
use qwenlora_core::dtype::Dtype;
use qwenlora_core::header::TensorInfo;
use qwenlora_core::source::{ByteRange, FileIdentity, RangeFault, SourceError, SourceFile};
use tempfile::TempDir;

/// A folder with one file in it.
fn folder_with(content: &[u8]) -> (TempDir, PathBuf) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("lora.safetensors");
    fs::write(&path, content).unwrap();
    (folder, path)
}

/// The message with the path cut down to the file's name.
fn message(error: &SourceError, path: &Path) -> String {
    let message = error.to_string();
    let path = path.to_string_lossy();
    assert!(message.starts_with(&format!("`{path}`: ")), "{message}");
    message.replace(&*path, "lora.safetensors")
}

fn threads(count: usize) -> NonZeroUsize {
    NonZeroUsize::new(count).unwrap()
}

/// Bytes without period, so that a misplaced chunk shows.
fn pattern(len: usize) -> Vec<u8> {
    let mut state = 1_u32;
    let next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        state.to_be_bytes()[0]
    };
    std::iter::repeat_with(next).take(len).collect()
}

/// A file of one tensor of one element for each case.
fn scalar_file(cases: &[(Dtype, &[u8])]) -> Vec<u8> {
    let mut data = Vec::new();
    let mut entries = Vec::new();
    for (index, (dtype, bytes)) in cases.iter().enumerate() {
        let (begin, end) = (data.len(), data.len() + bytes.len());
        let shape = ["[]", "[1]", "[1,1]"][index % 3];
        entries.push(format!(
            r#""{index}":{{"dtype":"{dtype}","shape":{shape},"data_offsets":[{begin},{end}]}}"#
        ));
        data.extend(*bytes);
    }
    let header = format!("{{{}}}", entries.join(","));
    [
        &(header.len() as u64).to_le_bytes(),
        header.as_bytes(),
        &data,
    ]
    .concat()
}

/// The values of these elements, read from a file.
fn scalars(cases: &[(Dtype, &[u8])]) -> Vec<f64> {
    let (_folder, path) = folder_with(&scalar_file(cases));
    let source = SourceFile::open(path).unwrap();
    let header = source.read_header().unwrap();
    header
        .tensors()
        .iter()
        .map(|tensor| source.read_scalar(tensor).unwrap())
        .collect()
}

fn tensors_of(source: &SourceFile) -> Vec<TensorInfo> {
    source.read_header().unwrap().tensors().to_vec()
}

#[test]
fn identity_is_that_of_the_file() {
    let (folder, path) = folder_with(b"content");
    let source = SourceFile::open(&path).unwrap();
    assert_eq!(source.path(), path);
    let identity = source.identity();
    assert_eq!(identity.size_bytes(), 7);
    assert_eq!(identity, SourceFile::open(&path).unwrap().identity());
    assert_eq!(
        identity,
        &FileIdentity::of(&File::open(&path).unwrap()).unwrap()
    );

    let modified = fs::metadata(&path).unwrap().modified().unwrap();
    let since_1970 = modified.duration_since(SystemTime::UNIX_EPOCH).unwrap();
    assert_eq!(identity.mtime_ns().unsigned_abs(), since_1970.as_nanos());

    let copy = folder.path().join("copy");
    fs::copy(&path, &copy).unwrap();
    let copy = SourceFile::open(copy).unwrap();
    assert_ne!(identity, copy.identity());
    assert_eq!(identity.volume(), copy.identity().volume());
    assert_ne!(identity.file_id(), copy.identity().file_id());
    assert_eq!(
        HashSet::from([identity.clone(), copy.identity().clone(), identity.clone()]).len(),
        2
    );
}

#[test]
fn unchanged_files_verify() {
    let (folder, path) = folder_with(b"content");
    let source = SourceFile::open(&path).unwrap();
    source.verify_unchanged().unwrap();
    // Another file takes the path; the handle keeps the old one.
    let other = folder.path().join("other");
    fs::write(&other, b"something else").unwrap();
    if fs::rename(&other, &path).is_ok() {
        let mut bytes = [0; 7];
        let range = ByteRange {
            offset_bytes: 0,
            len_bytes: 7,
            dest_offset: 0,
        };
        source
            .read_ranges(&[range], &mut bytes, threads(2))
            .unwrap();
        assert_eq!(&bytes, b"content");
    }
}

#[test]
fn a_changed_size_is_noticed() {
    let (_folder, path) = folder_with(b"content");
    let source = SourceFile::open(&path).unwrap();
    let modified = fs::metadata(&path).unwrap().modified().unwrap();
    let file = File::options().write(true).open(&path).unwrap();
    file.set_len(3).unwrap();
    file.set_modified(modified).unwrap();
    assert_snapshot!(message(&source.verify_unchanged().unwrap_err(), &path), @r"
    `lora.safetensors`: the file changed while it was read: size from 7 to 3 bytes
    hint: try again once it is complete
    ");
}

#[test]
fn a_changed_time_is_noticed() {
    let (_folder, path) = folder_with(b"content");
    let file = File::options().write(true).open(&path).unwrap();
    let second = |count| SystemTime::UNIX_EPOCH + Duration::from_secs(count);
    file.set_modified(second(1_000_000_000)).unwrap();
    let source = SourceFile::open(&path).unwrap();
    file.set_modified(second(1_000_000_001)).unwrap();
    assert_snapshot!(message(&source.verify_unchanged().unwrap_err(), &path), @r"
    `lora.safetensors`: the file changed while it was read: time from 1000000000000000000 to 1000000001000000000 ns
    hint: try again once it is complete
    ");
}

#[test]
fn a_file_cut_short_while_open_ends() {
    let (_folder, path) = folder_with(&scalar_file(&[
        (Dtype::F32, &[0; 4]),
        (Dtype::F64, &[0; 8]),
    ]));
    let source = SourceFile::open(&path).unwrap();
    let tensors = tensors_of(&source);
    let end = source.identity().size_bytes();
    let file = File::options().write(true).open(&path).unwrap();
    file.set_len(end - 3).unwrap();

    assert!(source.read_scalar(&tensors[0]).is_ok());
    assert_snapshot!(message(&source.read_scalar(&tensors[1]).unwrap_err(), &path), @r"
    `lora.safetensors`: the file ended at byte 124 while it was read
    hint: it was changed at the same time; try again once it is complete
    ");
    let range = ByteRange {
        offset_bytes: 0,
        len_bytes: end,
        dest_offset: 0,
    };
    let mut dest = vec![0; usize::try_from(end).unwrap()];
    for count in [1, 4] {
        let error = source
            .read_ranges(&[range], &mut dest, threads(count))
            .unwrap_err();
        assert!(
            matches!(error, SourceError::Ended { offset_bytes, .. } if offset_bytes == end - 3)
        );
    }
    file.set_len(20).unwrap();
    assert_snapshot!(message(&source.read_header().unwrap_err(), &path), @r"
    `lora.safetensors`: the file ended at byte 20, inside the header
    hint: it changed while it was read; try again once it is complete
    ");
    assert!(matches!(
        source.verify_unchanged(),
        Err(SourceError::Changed { .. })
    ));
}

#[test]
fn what_is_no_file_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path();
    assert_snapshot!(message(&SourceFile::open(path).unwrap_err(), path), @"`lora.safetensors`: is a folder, not a file");
    let missing = path.join("missing");
    let error = SourceFile::open(&missing).unwrap_err();
    assert!(message(&error, &missing).starts_with("`lora.safetensors`: cannot read the file: "));
    assert!(
        matches!(error, SourceError::Io { source, .. } if source.kind() == std::io::ErrorKind::NotFound)
    );
}

/// To open a pipe would wait for its writer.
#[cfg(unix)]
#[test]
fn pipes_and_devices_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let pipe = folder.path().join("pipe");
    assert!(
        std::process::Command::new("mkfifo")
            .arg(&pipe)
            .status()
            .unwrap()
            .success()
    );
    assert_snapshot!(message(&SourceFile::open(&pipe).unwrap_err(), &pipe), @"`lora.safetensors`: is not a regular file");
    let error = SourceFile::open("/dev/zero").unwrap_err();
    assert!(matches!(error, SourceError::NotAFile { .. }));
}

#[cfg(unix)]
#[test]
fn links_are_followed() {
    let (folder, path) = folder_with(b"content");
    let link = folder.path().join("link");
    std::os::unix::fs::symlink(&path, &link).unwrap();
    let source = SourceFile::open(&link).unwrap();
    assert_eq!(source.path(), link);
    assert_eq!(
        source.identity(),
        SourceFile::open(&path).unwrap().identity()
    );
}

#[test]
fn paths_may_hold_any_characters() {
    let error = SourceFile::open("/no/such\n\u{1b}[2J/ü `x`/ロラ").unwrap_err();
    assert!(
        error
            .to_string()
            .starts_with("`/no/such\\u{a}\\u{1b}[2J/ü \\u{60}x\\u{60}/ロラ`: ")
    );
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("ü 'ロラ' #1.safetensors");
    fs::write(&path, scalar_file(&[])).unwrap();
    assert!(tensors_of(&SourceFile::open(path).unwrap()).is_empty());
}

#[test]
fn a_bad_header_names_the_file() {
    let (_folder, path) = folder_with(b"");
    let source = SourceFile::open(&path).unwrap();
    assert_snapshot!(message(&source.read_header().unwrap_err(), &path), @r"
    `lora.safetensors`: the file is empty
    hint: a download or a save did not finish; get the file again
    ");
}

#[test]
fn scalars_of_every_dtype() {
    let table: [(Dtype, &[u8], f64); 37] = [
        (Dtype::Bool, &[0], 0.0),
        (Dtype::Bool, &[1], 1.0),
        (Dtype::U8, &[255], 255.0),
        (Dtype::I8, &[0x80], -128.0),
        (Dtype::U16, &[0xff, 0xff], 65535.0),
        (Dtype::I16, &[0, 0x80], -32768.0),
        (Dtype::U32, &[0xff; 4], 4_294_967_295.0),
        (Dtype::I32, &[0xfe, 0xff, 0xff, 0xff], -2.0),
        (
            Dtype::U64,
            &[0, 0, 0, 0, 0, 0, 0, 0x80],
            9_223_372_036_854_775_808.0,
        ),
        (Dtype::I64, &[16, 0, 0, 0, 0, 0, 0, 0], 16.0),
        (Dtype::I64, &[0xff; 8], -1.0),
        (Dtype::F32, &0.1_f32.to_le_bytes(), 0.100_000_001_490_116_12),
        (Dtype::F64, &0.1_f64.to_le_bytes(), 0.1),
        (Dtype::BF16, &[0x80, 0x3f], 1.0),
        (Dtype::BF16, &[0x01, 0x80], -9.183_549_615_799_121e-41),
        (Dtype::BF16, &[0x80, 0xff], f64::NEG_INFINITY),
        (Dtype::F16, &[0x00, 0x3c], 1.0),
        (Dtype::F16, &[0x01, 0x00], 5.960_464_477_539_063e-8),
        (Dtype::F16, &[0xff, 0xfb], -65504.0),
        (Dtype::F16, &[0x00, 0x7c], f64::INFINITY),
        (Dtype::F8E5M2, &[0x3c], 1.0),
        (Dtype::F8E5M2, &[0x7b], 57344.0),
        (Dtype::F8E5M2, &[0xfc], f64::NEG_INFINITY),
        (Dtype::F8E5M2, &[0x01], 1.525_878_906_25e-5),
        (Dtype::F8E4M3, &[0x38], 1.0),
        (Dtype::F8E4M3, &[0x7e], 448.0),
        (Dtype::F8E4M3, &[0xb8], -1.0),
        (Dtype::F8E4M3, &[0x01], 0.001_953_125),
        (Dtype::F8E8M0, &[127], 1.0),
        (Dtype::F8E8M0, &[0], 5.877_471_754_111_438e-39),
        (Dtype::F8E8M0, &[254], 1.701_411_834_604_692_3e38),
        (Dtype::F8E5M2Fnuz, &[0x40], 1.0),
        (Dtype::F8E5M2Fnuz, &[0x7f], 57344.0),
        (Dtype::F8E4M3Fnuz, &[0x40], 1.0),
        (Dtype::F8E4M3Fnuz, &[0x7f], 240.0),
        (Dtype::F8E4M3Fnuz, &[0xff], -240.0),
        (Dtype::F8E4M3Fnuz, &[0x01], 0.000_976_562_5),
    ];
    let cases: Vec<_> = table
        .iter()
        .map(|&(dtype, bytes, _)| (dtype, bytes))
        .collect();
    for (found, (dtype, bytes, value)) in scalars(&cases).into_iter().zip(table) {
        assert_eq!(
            found.to_bits(),
            value.to_bits(),
            "{dtype} {bytes:x?}: {found}"
        );
    }
    let nans: [(Dtype, &[u8]); 8] = [
        (Dtype::F32, &[0, 0, 0xc0, 0x7f]),
        (Dtype::BF16, &[0xc0, 0x7f]),
        (Dtype::F16, &[0x01, 0x7c]),
        (Dtype::F8E5M2, &[0x7d]),
        (Dtype::F8E4M3, &[0xff]),
        (Dtype::F8E8M0, &[0xff]),
        (Dtype::F8E5M2Fnuz, &[0x80]),
        (Dtype::F8E4M3Fnuz, &[0x80]),
    ];
    assert!(scalars(&nans).into_iter().all(f64::is_nan));
}

/// Every small float against a reading by other means: shifted into an `f32` of the same layout,
/// then corrected for the difference of the biases.
#[test]
fn small_floats_are_exact() {
    let shifted = |magnitude: u32, shift: u32, bias: i32| {
        f64::from(f32::from_bits(magnitude << shift)) * 2_f64.powi(127 - bias)
    };
    let bytes: Vec<[u8; 2]> = (0..=u16::MAX).step_by(7).map(u16::to_le_bytes).collect();
    let cases: Vec<_> = bytes.iter().map(|bytes| (Dtype::F16, &bytes[..])).collect();
    for (found, bytes) in scalars(&cases).into_iter().zip(&bytes) {
        let bits = u32::from(u16::from_le_bytes(*bytes));
        let magnitude = bits & 0x7fff;
        if magnitude < 0x7c00 {
            assert_eq!(
                found.abs().to_bits(),
                shifted(magnitude, 13, 15).to_bits(),
                "{bits:x}"
            );
        } else {
            assert_eq!(found.is_infinite(), magnitude == 0x7c00, "{bits:x}");
            assert_eq!(found.is_nan(), magnitude != 0x7c00, "{bits:x}");
        }
        assert!(
            found.is_nan() || found.is_sign_negative() == (bits > 0x7fff),
            "{bits:x}"
        );
    }
    let table = [
        (Dtype::F8E5M2, 21, 15, 0x7c),
        (Dtype::F8E4M3, 20, 7, 0x7f),
        (Dtype::F8E5M2Fnuz, 21, 16, 0x80),
        (Dtype::F8E4M3Fnuz, 20, 8, 0x80),
    ];
    for (dtype, shift, bias, first_special) in table {
        let bytes: Vec<[u8; 1]> = (0..=u8::MAX).map(|byte| [byte]).collect();
        let cases: Vec<_> = bytes.iter().map(|byte| (dtype, &byte[..])).collect();
        for (found, [byte]) in scalars(&cases).into_iter().zip(bytes) {
            let magnitude = u32::from(byte & 0x7f);
            if magnitude < first_special && !(first_special == 0x80 && byte == 0x80) {
                assert_eq!(
                    found.abs().to_bits(),
                    shifted(magnitude, shift, bias).to_bits(),
                    "{dtype} {byte:x}"
                );
                assert_eq!(found.is_sign_negative(), byte > 0x7f, "{dtype} {byte:x}");
            } else {
                assert!(!found.is_finite(), "{dtype} {byte:x}");
            }
        }
    }
}

#[test]
fn scalars_read_together_are_those_read_alone() {
    let values: Vec<[u8; 8]> = (0..700_u32).map(|at| f64::from(at).to_le_bytes()).collect();
    let mut cases: Vec<(Dtype, &[u8])> = Vec::new();
    for (at, value) in values.iter().enumerate() {
        match at % 3 {
            0 => cases.push((Dtype::F64, value)),
            1 => cases.push((Dtype::U16, &value[6..])),
            _ => cases.push((Dtype::U8, &value[7..])),
        }
    }
    let (_folder, path) = folder_with(&scalar_file(&cases));
    let source = SourceFile::open(&path).unwrap();
    let tensors = tensors_of(&source);
    let alone = |tensor: &TensorInfo| source.read_scalar(tensor).unwrap();
    // In any order, and with gaps where tensors are left out.
    let all: Vec<&TensorInfo> = tensors.iter().collect();
    let some: Vec<&TensorInfo> = tensors.iter().rev().step_by(170).collect();
    for chosen in [all, some, Vec::new()] {
        let expected: Vec<f64> = chosen.iter().map(|tensor| alone(tensor)).collect();
        assert_eq!(source.read_scalars(&chosen).unwrap(), expected);
    }

    // What cannot be read together is told as it is alone.
    let file = File::options().write(true).open(&path).unwrap();
    file.set_len(source.identity().size_bytes() - 3).unwrap();
    let own: Vec<&TensorInfo> = tensors.iter().collect();
    let together = source.read_scalars(&own).unwrap_err();
    let first = tensors
        .iter()
        .find_map(|tensor| source.read_scalar(tensor).err());
    assert_eq!(together.to_string(), first.unwrap().to_string());
}

#[test]
fn what_is_no_number_is_refused() {
    let header = r#"{"pair":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"complex":{"dtype":"C64","shape":[1],"data_offsets":[8,16]},"none":{"dtype":"F32","shape":[1,0],"data_offsets":[16,16]}}"#;
    let file = [
        &(header.len() as u64).to_le_bytes()[..],
        header.as_bytes(),
        &[0; 16],
    ]
    .concat();
    let (_folder, path) = folder_with(&file);
    let source = SourceFile::open(&path).unwrap();
    let tensors = tensors_of(&source);
    let refusal = |index: usize| message(&source.read_scalar(&tensors[index]).unwrap_err(), &path);
    assert_snapshot!(refusal(0), @"`lora.safetensors`: tensor `pair` is not a single value: shape [2]");
    assert_snapshot!(refusal(1), @"`lora.safetensors`: tensor `complex` does not hold a real number: C64");
    assert_snapshot!(refusal(2), @"`lora.safetensors`: tensor `none` is not a single value: shape [1, 0]");
}

#[test]
fn ranges_land_where_they_belong() {
    // Over two chunks long, so that one range is cut and shared out.
    let content = pattern(17 * 1024 * 1024 + 5);
    let (_folder, path) = folder_with(&content);
    let source = SourceFile::open(path).unwrap();
    let big = 16 * 1024 * 1024 + 3;
    let parts = [
        // Not in order; two that continue each other; one twice; an empty one; one long one.
        (100, 50, 1_000),
        (0, 7, 3),
        (150, 10, 1_050),
        (0, 7, 500),
        (17 * 1024 * 1024 + 5, 0, 0),
        (17 * 1024 * 1024, 5, 600),
        (1_024, big, 2_000),
    ];
    let ranges = parts.map(|(offset, len, dest_offset)| ByteRange {
        offset_bytes: offset as u64,
        len_bytes: len as u64,
        dest_offset,
    });
    let mut expected = vec![0xaa; 2_000 + big + 9];
    for (offset, len, dest) in parts {
        expected[dest..dest + len].copy_from_slice(&content[offset..offset + len]);
    }
    for count in [1, 4, 64] {
        let mut dest = vec![0xaa; expected.len()];
        source
            .read_ranges(&ranges, &mut dest, threads(count))
            .unwrap();
        assert!(dest == expected, "{count} threads");
    }
    source.read_ranges(&[], &mut [], threads(4)).unwrap();
    source.verify_unchanged().unwrap();
}

#[test]
fn many_small_ranges_land_where_they_belong() {
    let content = pattern(60_000);
    let (_folder, path) = folder_with(&content);
    let source = SourceFile::open(path).unwrap();
    // The file backwards in groups of three bytes, each second group left out.
    let ranges: Vec<ByteRange> = (0..10_000)
        .map(|index| ByteRange {
            offset_bytes: 59_997 - 6 * index,
            len_bytes: 3,
            dest_offset: 3 * usize::try_from(index).unwrap(),
        })
        .collect();
    let expected: Vec<u8> = content
        .chunks(3)
        .rev()
        .step_by(2)
        .flatten()
        .copied()
        .collect();
    for count in [1, 4] {
        let mut dest = vec![0; expected.len()];
        source
            .read_ranges(&ranges, &mut dest, threads(count))
            .unwrap();
        assert!(dest == expected, "{count} threads");
    }
}

#[test]
fn ranges_that_do_not_fit_are_refused() {
    let (_folder, path) = folder_with(&pattern(100));
    let source = SourceFile::open(&path).unwrap();
    let mut dest = [0xaa; 50];
    let range = |offset_bytes, len_bytes, dest_offset| ByteRange {
        offset_bytes,
        len_bytes,
        dest_offset,
    };
    let good = range(0, 10, 0);
    let mut refusal = |bad: ByteRange| {
        let error = source
            .read_ranges(&[good, bad], &mut dest, threads(2))
            .unwrap_err();
        assert_eq!(dest, [0xaa; 50], "nothing is read before all is checked");
        message(&error, &path)
    };
    assert_snapshot!(refusal(range(95, 6, 10)), @"`lora.safetensors`: a range ends beyond the file: 6 bytes from byte 95 on, in a file of 100 bytes");
    assert_snapshot!(refusal(range(u64::MAX, 2, 10)), @"`lora.safetensors`: a range ends beyond the file: 2 bytes from byte 18446744073709551615 on, in a file of 100 bytes");
    assert_snapshot!(refusal(range(101, 0, 10)), @"`lora.safetensors`: a range ends beyond the file: 0 bytes from byte 101 on, in a file of 100 bytes");
    assert_snapshot!(refusal(range(0, 10, 41)), @"`lora.safetensors`: a range ends beyond the destination: 10 bytes to byte 41 on, in a buffer of 50 bytes");
    assert_snapshot!(refusal(range(0, 10, usize::MAX)), @"`lora.safetensors`: a range ends beyond the destination: 10 bytes to byte 18446744073709551615 on, in a buffer of 50 bytes");
    assert_snapshot!(refusal(range(50, 10, 9)), @"`lora.safetensors`: two ranges overlap in the destination: from byte 9, and 10 bytes from byte 0 on");
    assert_snapshot!(refusal(range(50, 10, 0)), @"`lora.safetensors`: two ranges overlap in the destination: from byte 0, and 10 bytes from byte 0 on");
    let error = source
        .read_ranges(&[good, good], &mut dest, threads(1))
        .unwrap_err();
    assert!(matches!(
        error,
        SourceError::Range { source: RangeFault::Overlap { earlier, later }, .. } if earlier == good && later == good
    ));
}

/// A zip archive of stored, empty members, as a program writes it that knows their sizes.
fn zip(names: &[&str], comment: &[u8]) -> Vec<u8> {
    let (mut bytes, mut directory) = (Vec::new(), Vec::new());
    for name in names {
        let len = u16::try_from(name.len()).unwrap().to_le_bytes();
        let begin = u32::try_from(bytes.len()).unwrap().to_le_bytes();
        bytes.extend(b"PK\x03\x04");
        bytes.extend([0; 22]);
        bytes.extend(len);
        bytes.extend([0; 2]);
        bytes.extend(name.as_bytes());
        directory.extend(b"PK\x01\x02");
        directory.extend([0; 24]);
        directory.extend(len);
        directory.extend([0; 12]);
        directory.extend(begin);
        directory.extend(name.as_bytes());
    }
    let [begin, len] = [&bytes, &directory].map(|part| u32::try_from(part.len()).unwrap());
    bytes.extend(directory);
    bytes.extend(b"PK\x05\x06");
    bytes.extend([0; 8]);
    bytes.extend(len.to_le_bytes());
    bytes.extend(begin.to_le_bytes());
    bytes.extend(u16::try_from(comment.len()).unwrap().to_le_bytes());
    bytes.extend(comment);
    bytes
}

fn header_refusal(content: &[u8]) -> String {
    let (_folder, path) = folder_with(content);
    let error = SourceFile::open(&path).unwrap().read_header().unwrap_err();
    message(&error, &path)
}

#[test]
fn a_zip_archive_is_a_pickle_only_where_its_directory_says_so() {
    assert_snapshot!(header_refusal(&zip(&["read me.txt", "a/b.SFT", "c.safetensors"], b"")), @"
    `lora.safetensors`: the file is a zip archive, not safetensors: it holds `a/b.SFT`
    hint: unpack it, and use the file that it holds
    ");
    assert_snapshot!(header_refusal(&zip(&[], b"nothing")), @"
    `lora.safetensors`: the file is a zip archive, not safetensors
    hint: unpack it, and look for a `.safetensors` file in it
    ");
    let torch = ["x/.format_version", "x/data/0", "x/data.pkl", "x/version"];
    for comment in [b"".as_slice(), b"made by a site", b"PK\x05"] {
        let said = header_refusal(&zip(&torch, comment));
        assert!(said.contains("a PyTorch pickle"), "{said}");
    }
    // One that was cut short has no directory: its first member tells.
    let cut = zip(&["x/data.pkl", "x/data/0"], b"");
    let said = header_refusal(&cut[..60]);
    assert!(said.contains("a PyTorch pickle"), "{said}");
    let said = header_refusal(&zip(&torch, b"")[..60]);
    assert!(said.contains("a zip archive"), "{said}");
}

#[test]
fn lying_directories_of_archives_are_no_harm() {
    let whole = zip(&["a.txt", "b/data.pkl"], b"");
    for at in whole.len() - 22..whole.len() {
        for byte in [0xff, 0x7f, 1] {
            let mut lying = whole.clone();
            lying[at] = byte;
            let said = header_refusal(&lying);
            let is_told = ["archive", "pickle", "header length"];
            assert!(is_told.iter().any(|word| said.contains(word)), "{said}");
        }
    }
    // The record of a large archive, which lies elsewhere.
    let mut large = zip(&["b/data.pkl"], b"");
    let end = large.split_off(large.len() - 22);
    let begin = u64::try_from(large.len()).unwrap();
    large.extend(b"PK\x06\x06");
    large.extend([0; 36]);
    large.extend(56_u64.to_le_bytes());
    large.extend(40_u64.to_le_bytes());
    large.extend(b"PK\x06\x07");
    large.extend([0; 4]);
    large.extend(begin.to_le_bytes());
    large.extend([0; 4]);
    large.extend(&end[..12]);
    large.extend([0xff; 8]);
    large.extend([0; 2]);
    let said = header_refusal(&large);
    assert!(said.contains("a PyTorch pickle"), "{said}");
}
