//! Readers: buffers that threads fill while whoever asked for that does something else.

#![expect(clippy::unwrap_used, reason = "the helpers belong to the tests")]

mod pattern;

use std::fs::{self, File};
use std::num::NonZeroUsize;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use pattern::pattern;
use proptest::collection::vec;
use proptest::prelude::*;
use proptest::sample::Index;
use qwenlora_core::dtype::Dtype;
use qwenlora_core::packed::findings::{Block, Factors};
use qwenlora_core::packed::magnitude::Magnitudes;
use qwenlora_core::source::{ByteRange, RangeFault, Readers, Reading, SourceError, SourceFile};
use tempfile::TempDir;

const THREADS: [usize; 3] = [1, 2, 16];
const MIB: usize = 1024 * 1024;
/// What a buffer holds before it is filled.
const BEFORE: u8 = 0xaa;
/// Longer than anything here takes: a test that waits so long has failed.
const LONG: Duration = Duration::from_secs(60);

fn threads(count: usize) -> NonZeroUsize {
    NonZeroUsize::new(count).unwrap()
}

/// A file of a pattern.
struct Open {
    _folder: TempDir,
    path: PathBuf,
    content: Vec<u8>,
    source: Arc<SourceFile>,
}

impl Open {
    fn new(len: usize, seed: u32) -> Self {
        let content = pattern(len, seed);
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("lora.safetensors");
        fs::write(&path, &content).unwrap();
        let source = Arc::new(SourceFile::open(&path).unwrap());
        Self {
            _folder: folder,
            path,
            content,
            source,
        }
    }

    /// What a buffer holds when these ranges were read into it.
    fn expected(&self, ranges: &[ByteRange], len: usize) -> Vec<u8> {
        let mut expected = vec![BEFORE; len];
        for range in ranges {
            let begin = usize::try_from(range.offset_bytes).unwrap();
            let len = usize::try_from(range.len_bytes).unwrap();
            expected[range.dest_offset..][..len].copy_from_slice(&self.content[begin..][..len]);
        }
        expected
    }

    fn cut_short(&self, len: usize) {
        let file = File::options().write(true).open(&self.path).unwrap();
        file.set_len(len as u64).unwrap();
    }
}

fn range(offset: usize, len: usize, dest_offset: usize) -> ByteRange {
    ByteRange {
        offset_bytes: offset as u64,
        len_bytes: len as u64,
        dest_offset,
    }
}

/// Every second byte of a file: so many reads that one thread takes a while.
fn every_second_byte(file: &Open) -> Vec<ByteRange> {
    let offsets = (0..file.content.len()).step_by(2);
    offsets.map(|at| range(at, 1, at / 2)).collect()
}

/// A buffer that is being filled, or that it was refused to fill.
struct Filling {
    reading: Result<Reading, SourceError>,
    buffer: *mut [u8],
}

impl Filling {
    fn begin(readers: &Readers, file: &Open, ranges: &[ByteRange], len: usize) -> Self {
        Self::begin_measured(readers, file, ranges, len, None)
    }

    #[expect(unsafe_code, reason = "the buffer is lent, and taken back")]
    fn begin_measured(
        readers: &Readers,
        file: &Open,
        ranges: &[ByteRange],
        len: usize,
        measured: Option<Dtype>,
    ) -> Self {
        let measured = measured.map(|dtype| Magnitudes::of(dtype).unwrap());
        let buffer: *mut [u8] = Box::leak(vec![BEFORE; len].into_boxed_slice());
        // SAFETY: leaked a line ago, and not used by anybody else before it is taken back.
        let lent = unsafe { &mut *buffer };
        let reading = readers.read(&file.source, ranges, lent, measured);
        Self { reading, buffer }
    }

    fn wait(&self, timeout: Duration) -> Result<bool, SourceError> {
        self.reading.as_ref().unwrap().wait(timeout)
    }

    /// The buffer, after the reading is dropped.
    #[expect(unsafe_code, reason = "the buffer is lent, and taken back")]
    fn taken_back(self) -> Box<[u8]> {
        drop(self.reading);
        // SAFETY: it was a box before, and becomes one this once. Nobody writes to the buffer of a
        // reading that was dropped: so `Reading` promises.
        unsafe { Box::from_raw(self.buffer) }
    }

    fn filled(self) -> Box<[u8]> {
        assert!(self.wait(LONG).unwrap());
        self.taken_back()
    }
}

#[test]
fn bytes_are_those_of_the_file() {
    let file = Open::new(17 * MIB + 5, 1);
    let cases = [
        // Several pieces, cut where nothing in the file is.
        (vec![range(0, 17 * MIB + 5, 0)], 17 * MIB + 5),
        (vec![range(3, 16 * MIB + 1, 7)], 16 * MIB + 50),
        // Not in order; two that continue each other; one twice; empty ones.
        (
            vec![
                range(100, 50, 1_000),
                range(0, 7, 3),
                range(150, 10, 1_050),
                range(0, 7, 500),
                range(17 * MIB + 5, 0, 0),
                range(9, 0, 1_025),
                range(17 * MIB, 5, 600),
                range(1_024, 9 * MIB, 2_000),
            ],
            9 * MIB + 3_000,
        ),
        // The file backwards, each second group of three bytes left out.
        (
            (0..10_000)
                .map(|at| range(59_997 - 6 * at, 3, 3 * at))
                .collect(),
            30_000,
        ),
        (vec![range(4 * MIB, 1, 0)], 1),
    ];
    for count in THREADS {
        let readers = Readers::new(threads(count));
        for (case, (ranges, len)) in cases.iter().enumerate() {
            let found = Filling::begin(&readers, &file, ranges, *len).filled();
            let mut direct = vec![BEFORE; *len];
            file.source
                .read_ranges(ranges, &mut direct, threads(count))
                .unwrap();
            assert!(
                *found == file.expected(ranges, *len),
                "{count} threads, case {case}"
            );
            assert!(*found == *direct, "{count} threads, case {case}");
        }
    }
}

/// The largest magnitude among all values of some bytes, found another way.
fn largest(bytes: &[u8], dtype: Dtype) -> f64 {
    let block = |begin, slot_bytes| Block {
        begin,
        slot_bytes,
        dtype,
    };
    let blocks = [block(0, bytes.len()), block(0, 0)];
    Factors::new(bytes, &blocks, 1).unwrap().peak()
}

/// What is read of a file, measured on the way, beside what lies in the buffer.
fn peaks(file: &Open, begin: usize, len: usize, dtype: Dtype) -> [f64; 2] {
    let readers = Readers::new(threads(2));
    let ranges = [range(begin, len, 8), range(len, 4, 0)];
    let filling = Filling::begin_measured(&readers, file, &ranges, len + 8, Some(dtype));
    assert!(filling.wait(LONG).unwrap());
    let peak = filling.reading.as_ref().unwrap().peak().unwrap();
    let read = filling.taken_back();
    assert!(*read == file.expected(&ranges, len + 8));
    // Between the ranges nothing is measured.
    let parts = [&read[..4], &read[8..]].map(|part| largest(part, dtype));
    let outweighs = parts[0].is_nan() || parts[0] > parts[1];
    [peak, parts[usize::from(!outweighs)]]
}

#[test]
fn what_is_read_is_measured() {
    let len = 8 * MIB + 600_000;
    let loud = Open::new(len + 4, 3);
    let mut quiet = Open::new(len + 4, 4);
    for dtype in [Dtype::BF16, Dtype::F16, Dtype::F32] {
        for begin in [0, 3] {
            let [peak, wanted] = peaks(&loud, begin, len, dtype);
            assert_eq!(peak.to_bits(), wanted.to_bits(), "{dtype} from {begin}");
        }
        // One large value where what is measured at a time begins or ends.
        for at in [256 * 1024 - 4, 8 * MIB, len] {
            quiet.content.fill(0x11);
            quiet.content[at..at + 4].fill(0x44);
            fs::write(&quiet.path, &quiet.content).unwrap();
            quiet.source = Arc::new(SourceFile::open(&quiet.path).unwrap());
            let [peak, wanted] = peaks(&quiet, 0, len, dtype);
            assert_eq!(peak.to_bits(), wanted.to_bits(), "{dtype}, large at {at}");
            assert!(peak > 1.0, "{dtype}, large at {at}: {peak}");
        }
    }
}

#[test]
fn only_whole_values_are_measured() {
    let file = Open::new(100, 1);
    let readers = Readers::new(threads(1));
    let (whole, partial) = (range(0, 8, 0), range(20, 6, 8));
    let refused = Filling::begin_measured(&readers, &file, &[whole, partial], 20, Some(Dtype::F32));
    match &refused.reading {
        Err(SourceError::Range {
            source: RangeFault::PartialValue { range, dtype },
            ..
        }) => assert_eq!((*range, *dtype), (partial, Dtype::F32)),
        other => panic!("{other:?}"),
    }
    assert_eq!(*refused.taken_back(), [BEFORE; 20]);
    for dtype in [Dtype::F64, Dtype::I16, Dtype::F8E5M2] {
        assert_eq!(Magnitudes::of(dtype), None);
    }
    let nothing = Filling::begin_measured(&readers, &file, &[], 20, Some(Dtype::F32));
    assert!(nothing.wait(LONG).unwrap());
    assert_eq!(nothing.reading.as_ref().unwrap().peak(), Some(0.0));
    let not_asked = Filling::begin(&readers, &file, &[whole], 20);
    assert!(not_asked.wait(LONG).unwrap());
    assert_eq!(not_asked.reading.as_ref().unwrap().peak(), None);
}

#[test]
fn many_readings_of_several_files_wait_their_turn() {
    let files: Vec<Open> = (1..5)
        .map(|seed| Open::new(300_000 * seed, u32::try_from(seed).unwrap()))
        .collect();
    for count in THREADS {
        let readers = Readers::new(threads(count));
        let mut begun = Vec::new();
        for turn in 0..24 {
            let file = &files[turn % files.len()];
            let step = 700 + 100 * turn;
            let ranges: Vec<ByteRange> = (0..200)
                .map(|at| range(at * step % 200_000, step, (199 - at) * step))
                .collect();
            let len = 200 * step + turn;
            let filling = Filling::begin(&readers, file, &ranges, len);
            begun.push((filling, file.expected(&ranges, len)));
        }
        // Whoever asks last is answered first.
        for (turn, (filling, expected)) in begun.into_iter().enumerate().rev() {
            assert!(
                *filling.filled() == *expected,
                "{count} threads, turn {turn}"
            );
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Ranges that share no byte of the buffer, in any order, from anywhere, in several readings.
    #[test]
    fn arbitrary_ranges_land_where_they_belong(
        seed in any::<u32>(),
        file_len in 0..5_000_usize,
        parts in vec((any::<Index>(), any::<Index>(), 0..50_usize), 0..40),
        order in any::<u64>(),
        count in 1..17_usize,
    ) {
        let file = Open::new(file_len, seed);
        let readers = Readers::new(threads(count));
        let (mut ranges, mut end) = (Vec::new(), 0);
        for (from, size, gap) in parts {
            let begin = from.index(file_len + 1);
            let len = size.index(file_len - begin + 1);
            ranges.push(range(begin, len, end + gap));
            end += gap + len;
        }
        ranges.sort_by_key(|range| (range.dest_offset as u64).wrapping_mul(order | 1));
        let (some, others) = ranges.split_at(ranges.len() / 2);
        let begun = [some, others, &ranges].map(|own| Filling::begin(&readers, &file, own, end));
        for (filling, own) in begun.into_iter().zip([some, others, &ranges]) {
            prop_assert_eq!(&*filling.filled(), file.expected(own, end));
        }
    }
}

#[test]
fn ranges_that_do_not_fit_are_refused_before_anything_is_read() {
    let file = Open::new(100, 1);
    let readers = Readers::new(threads(2));
    let good = range(0, 10, 0);
    let refused = |bad: ByteRange| {
        let filling = Filling::begin(&readers, &file, &[good, bad], 50);
        let Err(SourceError::Range { path, source }) = &filling.reading else {
            panic!("{bad:?}");
        };
        assert_eq!(path, &file.path);
        let source = source.clone();
        // Had anything been begun, it would be done when the next one is.
        let next = Filling::begin(&readers, &file, &[good], 10);
        assert_eq!(*next.filled(), file.content[..10]);
        assert_eq!(*filling.taken_back(), [BEFORE; 50]);
        source
    };
    for bad in [range(95, 6, 10), range(101, 0, 10)] {
        let file_len_bytes = 100;
        let fault = RangeFault::BeyondFile {
            range: bad,
            file_len_bytes,
        };
        assert_eq!(refused(bad), fault);
    }
    let far = ByteRange {
        offset_bytes: u64::MAX,
        ..range(0, 2, 10)
    };
    assert!(matches!(refused(far), RangeFault::BeyondFile { .. }));
    for bad in [range(0, 10, 41), range(0, 10, usize::MAX)] {
        let fault = RangeFault::BeyondDest {
            range: bad,
            dest_len: 50,
        };
        assert_eq!(refused(bad), fault);
    }
    let later = range(50, 10, 9);
    let earlier = good;
    assert_eq!(refused(later), RangeFault::Overlap { earlier, later });
}

/// The error is told once; afterwards the buffer does not count as filled.
fn assert_ends(filling: &Filling, file: &Open, is_there: impl Fn(usize) -> bool) {
    match filling.wait(LONG) {
        Err(SourceError::Ended { path, offset_bytes }) => {
            assert_eq!(path, file.path);
            let offset = usize::try_from(offset_bytes).unwrap();
            assert!(is_there(offset), "{offset}");
        }
        other => panic!("{other:?}"),
    }
    for _ in 0..2 {
        let again = filling.wait(Duration::ZERO);
        assert!(
            matches!(&again, Err(SourceError::Stopped { path }) if *path == file.path),
            "{again:?}"
        );
    }
}

#[test]
fn a_file_cut_short_ends_its_readings_and_no_others() {
    const PIECE: usize = 8 * MIB;
    let end = 2 * PIECE + 10;
    for count in THREADS {
        let (cut, whole) = (Open::new(end, 1), Open::new(9 * MIB, 2));
        let readers = Readers::new(threads(count));
        cut.cut_short(PIECE + 100);
        let begin = |file: &Open, part: ByteRange| {
            let len = usize::try_from(part.len_bytes).unwrap();
            Filling::begin(&readers, file, &[part], len)
        };
        let before = begin(&whole, range(0, 9 * MIB, 0));
        let across = begin(&cut, range(PIECE, 1_000, 0));
        let long = begin(&cut, range(0, end, 0));
        let beyond = begin(&cut, range(PIECE + 500, 9, 0));
        let within = begin(&cut, range(7, PIECE + 93, 0));
        let after = begin(&whole, range(MIB, 8 * MIB, 0));

        assert_ends(&across, &cut, |offset| offset == PIECE + 100);
        // The last piece may be tried before the one that the end lies in.
        let in_order = count == 1;
        assert_ends(&long, &cut, |offset| {
            offset == PIECE + 100 || (!in_order && offset == 2 * PIECE)
        });
        assert_ends(&beyond, &cut, |offset| offset == PIECE + 500);
        assert!(*before.filled() == *whole.content);
        assert!(*within.filled() == cut.content[7..PIECE + 100]);
        assert!(*after.filled() == whole.content[MIB..]);
    }
}

#[test]
fn readers_that_are_dropped_end_every_reading() {
    let file = Open::new(400_000, 1);
    let slow = every_second_byte(&file);
    for count in THREADS {
        // A thread may be so late that all was read before: then once more.
        let is_stopped = (0..100).any(|_| {
            let readers = Readers::new(threads(count));
            let begun: Vec<(Filling, Vec<ByteRange>)> = [&slow, &slow, &vec![range(9, 100, 0)]]
                .map(|own| {
                    let filling = Filling::begin(&readers, &file, own, 200_000);
                    (filling, own.clone())
                })
                .into();
            drop(readers);
            let mut stopped = 0;
            for (filling, ranges) in begun {
                // All has ended when the readers are gone.
                match filling.wait(Duration::ZERO) {
                    Ok(true) => {
                        let expected = file.expected(&ranges, 200_000);
                        assert!(*filling.taken_back() == *expected);
                    }
                    Err(SourceError::Stopped { path }) => {
                        assert_eq!(path, file.path);
                        filling.taken_back();
                        stopped += 1;
                    }
                    other => panic!("{other:?}"),
                }
            }
            stopped > 0
        });
        assert!(is_stopped, "{count} threads");
    }
}

#[test]
fn a_wait_that_has_begun_ends_when_the_readers_are_dropped() {
    let file = Open::new(400_000, 1);
    let slow = every_second_byte(&file);
    let readers = Readers::new(threads(1));
    let begun: Vec<Filling> = (0..4)
        .map(|_| Filling::begin(&readers, &file, &slow, 200_000))
        .collect();
    std::thread::scope(|scope| {
        let waits: Vec<_> = begun
            .iter()
            .map(|filling| filling.reading.as_ref().unwrap())
            .map(|reading| scope.spawn(|| reading.wait(LONG)))
            .collect();
        drop(readers);
        for wait in waits {
            let ended = wait.join().unwrap();
            assert!(
                matches!(ended, Ok(true) | Err(SourceError::Stopped { .. })),
                "{ended:?}"
            );
        }
    });
}

#[test]
fn nothing_writes_to_the_buffer_of_a_dropped_reading() {
    const OWN: u8 = 0x55;
    let file = Open::new(24 * MIB, 1);
    let mut small = every_second_byte(&file);
    small.truncate(50_000);
    for count in THREADS {
        let readers = Readers::new(threads(count));
        for ranges in [vec![range(0, 24 * MIB, 0)], small.clone()] {
            let own = vec![OWN; 24 * MIB];
            for wait in [None, Some(Duration::ZERO), Some(Duration::from_millis(1))] {
                let kept = Filling::begin(&readers, &file, &[range(0, 9 * MIB, 0)], 9 * MIB);
                let dropped = Filling::begin(&readers, &file, &ranges, 24 * MIB);
                if let Some(timeout) = wait {
                    dropped.wait(timeout).unwrap();
                }
                let mut buffer = dropped.taken_back();
                buffer.fill(OWN);
                // What was asked for later is read later.
                let later = Filling::begin(&readers, &file, &[range(0, 20 * MIB, 0)], 20 * MIB);
                assert!(*later.filled() == file.content[..20 * MIB]);
                assert!(*buffer == *own, "{count} threads");
                assert!(*kept.filled() == file.content[..9 * MIB]);
            }
        }
    }
}

#[test]
fn a_dropped_reading_waits_for_none_before_it() {
    let file = Open::new(400_000, 1);
    let slow = every_second_byte(&file);
    let readers = Readers::new(threads(1));
    // A thread may be so late that all was read before: then once more.
    let is_early = (0..100).any(|_| {
        let [first, last] = [&slow, &slow].map(|own| Filling::begin(&readers, &file, own, 200_000));
        let untouched = last.taken_back().iter().all(|&byte| byte == BEFORE);
        let is_early = !first.wait(Duration::ZERO).unwrap();
        assert!(*first.filled() == *file.expected(&slow, 200_000));
        is_early && untouched
    });
    assert!(is_early);
}

#[test]
fn a_thread_that_panics_is_told_by_its_file() {
    let path = PathBuf::from("a/lora.safetensors");
    let error = SourceError::Panicked { path };
    let told = "`a/lora.safetensors`: reading failed: a thread panicked";
    assert_eq!(error.to_string(), told);
}

/// What was measured is told of a buffer that is filled, not of a part of it.
#[test]
fn there_is_no_peak_before_the_end() {
    const PIECE: usize = 8 * MIB;
    let (file, cut) = (Open::new(4 * PIECE, 1), Open::new(4 * PIECE, 2));
    cut.cut_short(3 * PIECE);
    let readers = Readers::new(threads(1));
    let begin = |file| {
        let whole = [range(0, 4 * PIECE, 0)];
        Filling::begin_measured(&readers, file, &whole, 4 * PIECE, Some(Dtype::BF16))
    };
    let [filling, failing] = [&file, &cut].map(begin);
    let peak = |filling: &Filling| filling.reading.as_ref().unwrap().peak();
    while peak(&filling).is_none() {
        assert!(!filling.wait(Duration::ZERO).unwrap() || peak(&filling).is_some());
        std::thread::yield_now();
    }
    assert!(filling.wait(Duration::ZERO).unwrap());
    failing.wait(LONG).unwrap_err();
    assert_eq!(peak(&failing), None);
    for filling in [filling, failing] {
        filling.taken_back();
    }
}

#[test]
fn nothing_to_read_is_done_at_once() {
    let file = Open::new(400_000, 1);
    let readers = Readers::new(threads(1));
    let slow = Filling::begin(&readers, &file, &every_second_byte(&file), 200_000);
    for (ranges, len) in [
        (vec![], 0),
        (vec![], 9),
        (vec![range(7, 0, 0), range(400_000, 0, 9)], 9),
    ] {
        let empty = Filling::begin(&readers, &file, &ranges, len);
        assert!(empty.wait(Duration::ZERO).unwrap());
        assert_eq!(*empty.taken_back(), vec![BEFORE; len]);
    }
    slow.filled();
}

#[test]
fn a_wait_ends_with_its_time() {
    let file = Open::new(400_000, 1);
    let slow = every_second_byte(&file);
    let readers = Readers::new(threads(1));
    // A thread may be so late that all was read before: then once more.
    let begun = (0..100)
        .map(|_| [&slow, &slow].map(|own| Filling::begin(&readers, &file, own, 200_000)))
        .find(|[_, last]| !last.wait(Duration::ZERO).unwrap())
        .unwrap();
    let [_, last] = &begun;
    let mut waits = 0;
    while !last.wait(Duration::from_millis(1)).unwrap() {
        waits += 1;
        assert!(waits < 60_000);
    }
    for filling in begun {
        // What was asked for before is done before, and stays so.
        for timeout in [Duration::ZERO, LONG, Duration::MAX] {
            assert!(filling.wait(timeout).unwrap());
        }
        assert!(*filling.taken_back() == *file.expected(&slow, 200_000));
    }
}

/// Whoever keeps a reading, in an error's traceback for example, keeps no file open.
#[cfg(target_os = "linux")]
#[test]
fn a_file_is_closed_when_its_last_byte_is_read() {
    let file = Open::new(9 * MIB, 1);
    let readers = Readers::new(threads(2));
    let filling = Filling::begin(&readers, &file, &[range(0, 9 * MIB, 0)], 9 * MIB);
    let Open {
        _folder,
        path,
        source,
        ..
    } = file;
    drop(source);
    assert!(filling.wait(LONG).unwrap());
    let open = fs::read_dir("/proc/self/fd").unwrap();
    let mut names = open.filter_map(|entry| fs::read_link(entry.unwrap().path()).ok());
    assert!(names.all(|name| name != path));
    filling.taken_back();
}
