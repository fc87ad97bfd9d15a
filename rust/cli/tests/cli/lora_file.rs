//! Builds LoRA files: real headers, real scalars, zeros for the rest (as holes, so that gigabytes
//! cost nothing).

use std::fs::File;
use std::io::{Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use serde_json::{Map, Value, json};

/// A file in the making.
#[derive(Default)]
pub(crate) struct LoraFile {
    metadata: Map<String, Value>,
    tensors: Map<String, Value>,
    scalars: Vec<(u64, Vec<u8>)>,
    order: Vec<String>,
    len_bytes: u64,
}

impl LoraFile {
    pub(crate) fn new() -> Self {
        Self::default()
    }

    pub(crate) fn metadata(mut self, key: &str, value: &str) -> Self {
        self.metadata.insert(key.to_owned(), value.into());
        self
    }

    /// A tensor of zeros.
    pub(crate) fn tensor(mut self, key: &str, dtype: &str, shape: &[u64]) -> Self {
        let width = match dtype {
            "F64" | "I64" => 8,
            "F32" => 4,
            "F16" | "BF16" => 2,
            _ => 1,
        };
        let end = self.len_bytes + width * shape.iter().product::<u64>();
        let entry = json!({"dtype": dtype, "shape": shape, "data_offsets": [self.len_bytes, end]});
        self.tensors.insert(key.to_owned(), entry);
        self.order.push(key.to_owned());
        self.len_bytes = end;
        self
    }

    /// A single value in these bytes.
    pub(crate) fn value(mut self, key: &str, dtype: &str, shape: &[u64], bytes: &[u8]) -> Self {
        self.scalars.push((self.len_bytes, bytes.to_vec()));
        self.tensor(key, dtype, shape)
    }

    pub(crate) fn alpha(self, module: &str, value: f32) -> Self {
        self.value(&format!("{module}.alpha"), "F32", &[], &value.to_le_bytes())
    }

    /// A pair in kohya's spelling.
    pub(crate) fn pair(self, module: &str, rank: u64, (out, inp): (u64, u64)) -> Self {
        self.tensor(&format!("{module}.lora_down.weight"), "BF16", &[rank, inp])
            .tensor(&format!("{module}.lora_up.weight"), "BF16", &[out, rank])
    }

    /// A pair in PEFT's spelling.
    pub(crate) fn peft_pair(self, module: &str, rank: u64, (out, inp): (u64, u64)) -> Self {
        self.tensor(&format!("{module}.lora_A.weight"), "BF16", &[rank, inp])
            .tensor(&format!("{module}.lora_B.weight"), "BF16", &[out, rank])
    }

    /// Writes the file and gives its path back.
    pub(crate) fn write(&self, path: impl AsRef<Path>) -> PathBuf {
        let mut entries: Vec<String> = Vec::new();
        if !self.metadata.is_empty() {
            entries.push(format!(
                "\"__metadata__\":{}",
                Value::Object(self.metadata.clone())
            ));
        }
        // `Map` sorts; a file keeps the order in which it was written.
        entries.extend(
            self.order
                .iter()
                .map(|key| format!("{}:{}", json!(key), self.tensors[key])),
        );
        let header = format!("{{{}}}", entries.join(","));
        let start = 8 + header.len() as u64;
        let mut file = File::create(path.as_ref()).unwrap();
        file.write_all(&(header.len() as u64).to_le_bytes())
            .unwrap();
        file.write_all(header.as_bytes()).unwrap();
        file.set_len(start + self.len_bytes).unwrap();
        for (offset, bytes) in &self.scalars {
            file.seek(SeekFrom::Start(start + offset)).unwrap();
            file.write_all(bytes).unwrap();
        }
        path.as_ref().to_owned()
    }
}

/// Sizes of the model's linears.
pub(crate) const SQUARE: (u64, u64) = (3072, 3072);
pub(crate) const MODULATION: (u64, u64) = (18432, 3072);

/// A file of which everything applies: kohya keys, two blocks, alpha at half the rank.
pub(crate) fn clean() -> LoraFile {
    let mut file = LoraFile::new().metadata("ss_network_module", "networks.lora_qwen_image");
    for block in [0, 1] {
        for name in ["attn_to_q", "attn_to_k", "attn_to_v", "img_mod_1"] {
            let module = format!("lora_unet_transformer_blocks_{block}_{name}");
            let size = if name == "img_mod_1" {
                MODULATION
            } else {
                SQUARE
            };
            file = file.pair(&module, 16, size).alpha(&module, 8.0);
        }
    }
    file
}

/// Two attention modules apply; an `AdaLoRA`, a broken pair and a text encoder's tensor do not.
pub(crate) fn partial() -> LoraFile {
    let module = |name: &str| format!("diffusion_model.transformer_blocks.7.attn.{name}");
    LoraFile::new()
        .peft_pair(&module("to_q"), 16, SQUARE)
        .peft_pair(&module("to_k"), 32, SQUARE)
        .peft_pair(&module("to_v"), 16, SQUARE)
        .tensor(&module("to_v.lora_E"), "F32", &[3072])
        .tensor(&module("to_out.0.lora_A.weight"), "BF16", &[16, 3072])
        .tensor("text_encoder.layers.0.q.lora_A.weight", "BF16", &[16, 64])
        .tensor("_aux.step", "I64", &[])
}

/// A FLUX LoRA: shares attention names with Qwen-Image.
pub(crate) fn flux() -> LoraFile {
    LoraFile::new()
        .peft_pair("transformer.transformer_blocks.0.attn.to_q", 16, SQUARE)
        .peft_pair(
            "transformer.single_transformer_blocks.0.attn.to_q",
            16,
            SQUARE,
        )
}

/// Every kind of layer of Z-Image, fused as ComfyUI's own nodes write it.
pub(crate) fn z_image() -> LoraFile {
    let mut file = LoraFile::new();
    let blocks = (0..30).map(|block| format!("layers.{block}"));
    for block in blocks.chain(["noise_refiner.1", "context_refiner.0"].map(str::to_owned)) {
        let module = |name: &str| format!("diffusion_model.{block}.{name}");
        file = file
            .pair(&module("attention.qkv"), 8, (11520, 3840))
            .pair(&module("attention.out"), 8, (3840, 3840))
            .pair(&module("feed_forward.w2"), 8, (3840, 10240))
            .tensor(&module("attention.q_norm.diff"), "BF16", &[128])
            .tensor(&module("ffn_norm2.diff"), "BF16", &[3840]);
        if !block.starts_with("context") {
            file = file.pair(&module("adaLN_modulation.0"), 8, (15360, 256));
        }
    }
    file.pair("diffusion_model.x_embedder", 8, (3840, 64))
        .pair("diffusion_model.final_layer.linear", 8, (64, 3840))
        .tensor("diffusion_model.cap_embedder.0.diff", "BF16", &[2560])
        .tensor("diffusion_model.norm_final.diff", "BF16", &[3840])
}

/// ai-toolkit's LoKr, both factors full.
pub(crate) fn lokr() -> LoraFile {
    let mut file = LoraFile::new().metadata(
        "software",
        r#"{"name": "ai-toolkit", "repo": "https://github.com/ostris"}"#,
    );
    for block in 0..60 {
        let module = format!("diffusion_model.transformer_blocks.{block}.attn.to_q");
        file = file
            .alpha(&module, 1e10)
            .tensor(&format!("{module}.lokr_w1"), "BF16", &[16, 16])
            .tensor(&format!("{module}.lokr_w2"), "BF16", &[192, 192]);
    }
    file
}
