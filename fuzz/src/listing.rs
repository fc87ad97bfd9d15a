//! A state dict as text, one tensor a line: `key`, dtype, shape and value, between tabs.
//!
//! `#` begins a line of metadata. What is missing or makes no sense has a default, so that any
//! bytes are a listing.

use qwenlora_core::dtype::Dtype;
use qwenlora_core::key::table::RawTensor;
use qwenlora_core::plan::FilePlan;

use crate::{assert_speakable, plan};

/// A state dict and its metadata.
#[derive(Debug, Clone, Default)]
pub struct Listing {
    /// The tensors.
    pub tensors: Vec<RawTensor>,
    /// The value of each, where it has one.
    pub scalars: Vec<Option<f64>>,
    /// The metadata.
    pub metadata: Vec<(String, String)>,
}

impl Listing {
    /// Reads a listing.
    pub fn parse(bytes: &[u8]) -> Self {
        let text = String::from_utf8_lossy(bytes);
        let mut listing = Self::default();
        for line in text.lines().filter(|line| !line.is_empty()) {
            if let Some(pair) = line.strip_prefix('#') {
                let (key, value) = pair.split_once('\t').unwrap_or((pair, ""));
                listing.metadata.push((key.to_owned(), value.to_owned()));
            } else {
                listing.add_line(line);
            }
        }
        listing
    }

    fn add_line(&mut self, line: &str) {
        let mut fields = line.split('\t');
        let key = fields.next().unwrap_or_default();
        let dtype = fields.next().and_then(Dtype::parse).unwrap_or(Dtype::BF16);
        let shape = fields.next().unwrap_or_default();
        let shape = shape
            .split('x')
            .filter_map(|side| side.parse().ok())
            .take(8)
            .collect();
        let value = fields.next().and_then(|value| value.parse().ok());
        self.add(key.to_owned(), dtype, shape, value);
    }

    /// Adds a tensor; a value only where the shape has one.
    pub fn add(&mut self, key: String, dtype: Dtype, shape: Vec<u64>, value: Option<f64>) {
        let elements = shape
            .iter()
            .fold(1_u64, |product, side| product.saturating_mul(*side));
        let len_bytes = elements.saturating_mul(dtype.bits()) / 8;
        self.tensors.push(RawTensor {
            key,
            dtype,
            shape,
            offset_bytes: 0,
            len_bytes,
        });
        self.scalars
            .push((elements == 1).then_some(value).flatten());
    }

    /// Plans it twice, checks the plan; none where it is refused.
    pub fn check(&self) -> Option<FilePlan> {
        let plan = || {
            let (tensors, metadata) = (self.tensors.clone(), self.metadata.clone());
            FilePlan::from_tensors("listing", tensors, &self.scalars, metadata)
        };
        match (plan(), plan()) {
            (Ok(first), Ok(second)) => {
                assert_eq!(first.to_json(), second.to_json());
                plan::check(&first, self.tensors.iter().map(|t| t.key.as_str()));
                Some(first)
            }
            (Err(first), Err(second)) => {
                assert_eq!(first.to_string(), second.to_string());
                assert_speakable(&first.to_string());
                None
            }
            _ => panic!("the same tensors are taken and refused"),
        }
    }
}

/// Checks a listing.
pub fn check(bytes: &[u8]) {
    Listing::parse(bytes).check();
}
