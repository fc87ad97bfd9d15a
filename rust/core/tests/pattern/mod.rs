//! Contents of buffers and files.

/// Bytes without period, so that misplaced ones show.
pub(crate) fn pattern(len: usize, seed: u32) -> Vec<u8> {
    let mut state = u64::from(seed);
    let mut next = || {
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (state ^ (state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        (mixed ^ (mixed >> 27)).to_le_bytes()
    };
    let mut bytes = vec![0; len];
    // Eight at a time: there are many, and tests are not optimized.
    for chunk in bytes.chunks_mut(8) {
        chunk.copy_from_slice(&next()[..chunk.len()]);
    }
    bytes
}
