//! Stacked rows against the formula of the interleaved order, and every fault of a recipe.

use std::num::NonZeroUsize;

use insta::assert_snapshot;
use proptest::prelude::*;
use qwenlora_core::rows::{RowsColumn, RowsRecipe, fill};

fn some(count: usize) -> NonZeroUsize {
    NonZeroUsize::new(count).expect("some")
}

proptest! {
    #[test]
    fn any_columns_equal_the_formula(
        planes in 1..7_usize,
        plane_rows in 0..60_usize,
        widths in prop::collection::vec((0..300_usize, any::<bool>()), 0..4),
        threads in 1..4_usize,
    ) {
        let rows = planes * plane_rows;
        let sources: Vec<Option<Vec<u8>>> = (1..).zip(&widths).map(|(seed, &(width, is_there))| {
            let byte = |at: usize| u8::try_from((at * 31 + at / 251 + seed) % 256).expect("a byte");
            is_there.then(|| (0..rows * width).map(byte).collect())
        }).collect();
        let row_bytes: usize = widths.iter().map(|(width, _)| width).sum();
        let mut dest = vec![0xa5; rows * row_bytes];
        let columns = sources.iter().zip(&widths).map(|(source, &(width_bytes, _))| RowsColumn {
            source: source.as_deref(),
            width_bytes,
        });
        let recipe = RowsRecipe {
            dest: &mut dest,
            rows,
            planes: some(planes),
            columns: columns.collect(),
        };
        prop_assert!(fill(&mut [recipe], some(threads)).is_ok());
        for plane in 0..planes {
            for channel in 0..plane_rows {
                let mut at = (channel * planes + plane) * row_bytes;
                for (source, &(width, _)) in sources.iter().zip(&widths) {
                    let from = (plane * plane_rows + channel) * width;
                    match source {
                        Some(source) => {
                            prop_assert_eq!(&dest[at..at + width], &source[from..from + width]);
                        }
                        None => prop_assert!(dest[at..at + width].iter().all(|&byte| byte == 0)),
                    }
                    at += width;
                }
            }
        }
    }
}

#[test]
fn a_factor_of_several_bands() {
    let (rows, width) = (18_432, 128);
    let source: Vec<u8> = (0..rows * width)
        .map(|at| u8::try_from(at / width % 251).expect("a byte"))
        .collect();
    let mut dest = vec![0; rows * width];
    let column = RowsColumn {
        source: Some(&source),
        width_bytes: width,
    };
    let recipe = RowsRecipe {
        dest: &mut dest,
        rows,
        planes: some(6),
        columns: vec![column],
    };
    fill(&mut [recipe], some(2)).expect("a right recipe");
    for (at, row) in dest.chunks(width).enumerate() {
        let from = at % 6 * 3072 + at / 6;
        assert_eq!(row, &source[from * width..][..width], "row {at}");
    }
}

fn fault(dest_len: usize, rows: usize, columns: &[RowsColumn<'_>]) -> String {
    let mut dest = vec![7; dest_len];
    let recipe = RowsRecipe {
        dest: &mut dest,
        rows,
        planes: some(6),
        columns: columns.to_vec(),
    };
    let error = fill(&mut [recipe], some(1)).expect_err("a wrong recipe");
    assert!(dest.iter().all(|&byte| byte == 7), "nothing may be written");
    error.to_string()
}

#[test]
fn recipes_that_do_not_fit() {
    let zero = |width_bytes| RowsColumn {
        source: None,
        width_bytes,
    };
    assert_snapshot!(fault(80, 8, &[zero(10)]), @"recipe 0: rows must be a multiple of the 6 planes, got 8");
    assert_snapshot!(fault(80, 12, &[zero(4), zero(3)]), @"recipe 0: the destination has 80 bytes; 12 rows of 7 take 84");
    let short = RowsColumn {
        source: Some(&[0; 35]),
        width_bytes: 3,
    };
    assert_snapshot!(fault(84, 12, &[zero(4), short]), @"recipe 0: column 1: the source has 35 bytes; 12 rows of 3 take 36");
    let large = [zero(usize::MAX), zero(1)];
    assert_snapshot!(fault(0, 12, &large), @"recipe 0: a tensor of the recipe is too large for this machine's memory");
    assert_snapshot!(fault(0, 12, &large[..1]), @"recipe 0: a tensor of the recipe is too large for this machine's memory");
}
