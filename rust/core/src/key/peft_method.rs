//! The kinds of adapter that only PEFT knows, told by the names of their parameters.

/// A kind of adapter of PEFT's that this version does not apply.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct PeftMethod {
    /// How a segment of its keys begins.
    segment: &'static str,
    /// The name in JSON, and PEFT's `peft_type` in lower case where it has one.
    pub name: &'static str,
    /// How people write it.
    pub title: &'static str,
}

const fn method(segment: &'static str, name: &'static str, title: &'static str) -> PeftMethod {
    PeftMethod {
        segment,
        name,
        title,
    }
}

/// `adapter_layer_names` of PEFT 0.21's tuners, but for those that other programs write, too.
///
/// `lora_E` and `lora_diag` stand beside a pair `lora_A`, `lora_B`, which without them would be
/// another LoRA.
const METHODS: [PeftMethod; 31] = [
    method("lora_E", "adalora", "AdaLoRA"),
    method("lora_diag", "kasa", "KaSA"),
    method("adamss_", "adamss", "AdaMSS"),
    method("beft_bias", "beft", "BEFT"),
    method("c3a_kernel", "c3a", "C3A"),
    method("deft_", "deft", "DEFT"),
    method("delora_", "delora", "DeLoRA"),
    method("fourierft_spectrum", "fourierft", "FourierFT"),
    method("frod_", "frod", "FRoD"),
    method("glora_", "glora", "GLoRA"),
    method("gralora_", "gralora", "GraLoRA"),
    method("hira_", "hira", "HiRA"),
    method("lily_", "lily", "Lily"),
    method("ln_tuning_layers", "ln_tuning", "LN tuning"),
    method("miss_block", "miss", "MiSS"),
    method("osf_", "osf", "OSF"),
    method("peanut_", "peanut", "PEANuT"),
    method("poly_", "poly", "Poly"),
    method("psoft_", "psoft", "PSOFT"),
    method("pvera_lambda_", "pvera", "PVeRA"),
    method("randlora_", "randlora", "RandLoRA"),
    method("road_", "road", "RoAd"),
    method("shadow_", "shadow", "Shadow"),
    method("shira_", "shira", "SHiRA"),
    method("supertuning_", "supertuning", "SuperTuning"),
    method("tinylora_", "tinylora", "TinyLoRA"),
    method("trainable_tokens_", "trainable_tokens", "trainable tokens"),
    method("unilora_", "unilora", "Uni-LoRA"),
    method("vblora_", "vblora", "VB-LoRA"),
    method("vera_lambda_", "vera", "VeRA"),
    method("waveft_spectrum", "waveft", "WaveFT"),
];

/// How the segments of [`METHODS`] begin: four bytes tell nearly all other segments apart.
const HEADS: [u32; METHODS.len()] = {
    let (mut heads, mut at) = ([0; METHODS.len()], 0);
    while at < METHODS.len() {
        let Some(head) = METHODS[at].segment.as_bytes().first_chunk() else {
            panic!("no segment is shorter");
        };
        heads[at] = u32::from_ne_bytes(*head);
        at += 1;
    }
    heads
};

/// The method that a segment of a key names.
pub(crate) fn of_segment(segment: &str) -> Option<&'static PeftMethod> {
    let head = u32::from_ne_bytes(*segment.as_bytes().first_chunk()?);
    // All are compared at once, without an early end.
    if HEADS.iter().filter(|own| **own == head).count() == 0 {
        return None;
    }
    METHODS
        .iter()
        .find(|method| segment.starts_with(method.segment))
}

/// The method that a key names.
pub(crate) fn of_key(key: &str) -> Option<&'static PeftMethod> {
    key.split('.').find_map(of_segment)
}
