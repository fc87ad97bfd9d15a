//! State dicts without data, key by key.

use qwenlora_core::dtype::Dtype;
use qwenlora_core::key::table::RawTensor;
use qwenlora_core::plan::{FilePlan, PlanError};

/// A module of every Qwen-Image LoRA.
pub(crate) const TO_Q: &str = "transformer_blocks.0.attn.to_q";

/// A state dict in the making.
#[derive(Default)]
pub(crate) struct Tensors {
    rows: Vec<RawTensor>,
    scalars: Vec<Option<f64>>,
    metadata: Vec<(String, String)>,
}

#[allow(dead_code, reason = "each test file uses a part of them")]
impl Tensors {
    /// A tensor whose bytes are not those of its shape: only its header is looked at.
    pub(crate) fn sized(self, key: &str, shape: &[u64], len_bytes: u64) -> Self {
        self.row(key, Dtype::BF16, shape, len_bytes)
    }

    pub(crate) fn typed(self, key: &str, dtype: Dtype, shape: &[u64]) -> Self {
        let elements = shape.iter().fold(1u64, |n, d| n.saturating_mul(*d));
        self.row(key, dtype, shape, elements.saturating_mul(dtype.bits()) / 8)
    }

    fn row(mut self, key: &str, dtype: Dtype, shape: &[u64], len_bytes: u64) -> Self {
        self.rows.push(RawTensor {
            key: key.to_owned(),
            dtype,
            shape: shape.to_vec(),
            offset_bytes: 0,
            len_bytes,
        });
        self.scalars.push(None);
        self
    }

    pub(crate) fn tensor(self, key: &str, shape: &[u64]) -> Self {
        self.typed(key, Dtype::BF16, shape)
    }

    pub(crate) fn scalar(self, key: &str, value: f64) -> Self {
        let mut tensors = self.typed(key, Dtype::F64, &[]);
        *tensors.scalars.last_mut().unwrap() = Some(value);
        tensors
    }

    pub(crate) fn peft(self, stem: &str, rank: u64) -> Self {
        self.tensor(&format!("{stem}.lora_A.weight"), &[rank, 3072])
            .tensor(&format!("{stem}.lora_B.weight"), &[3072, rank])
    }

    pub(crate) fn kohya(self, stem: &str, rank: u64) -> Self {
        self.tensor(&format!("{stem}.lora_down.weight"), &[rank, 3072])
            .tensor(&format!("{stem}.lora_up.weight"), &[3072, rank])
    }

    pub(crate) fn metadata(mut self, key: &str, value: &str) -> Self {
        self.metadata.push((key.to_owned(), value.to_owned()));
        self
    }

    pub(crate) fn try_plan(self) -> Result<FilePlan, PlanError> {
        FilePlan::from_tensors("test", self.rows, &self.scalars, self.metadata)
    }

    pub(crate) fn plan(self) -> FilePlan {
        self.try_plan().unwrap()
    }
}
