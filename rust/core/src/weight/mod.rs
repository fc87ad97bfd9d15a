//! 4-bit weights as numbers: packed bytes to rows of float32, and the norms of rows and columns.
//!
//! What adapters need to know of a weight is computed from its rows, some at a time. This is the one
//! place where values are computed instead of moved: in host memory torch takes fifty times as long
//! to bring the packed order back.

mod awq;
mod error;
mod norms;
mod svdq;

pub use awq::Awq;
pub use error::WeightFault;
pub use norms::{column_norms, row_norms};
pub use svdq::{Svdq, SvdqForm};

/// One float32, as it lies in memory.
type Float = [u8; 4];

/// Memory as floats; a rest that is no whole one is left out.
fn floats(bytes: &[u8]) -> &[Float] {
    bytes.as_chunks().0
}

fn value(float: Float) -> f32 {
    f32::from_ne_bytes(float)
}

/// Checks that memory is as long as its shape says.
fn check_len(what: &'static str, got_bytes: usize, sizes: &[usize]) -> Result<(), WeightFault> {
    let want = sizes
        .iter()
        .try_fold(1_usize, |product, &size| product.checked_mul(size));
    match want {
        Some(want_bytes) if want_bytes == got_bytes => Ok(()),
        want_bytes => Err(WeightFault::Length {
            what,
            got_bytes,
            want_bytes,
        }),
    }
}
