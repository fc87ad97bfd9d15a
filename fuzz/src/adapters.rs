//! Adapters of every family put together from the grammar's words, planned, and stacked.
//!
//! Bytes choose modules, families, spellings and what is wrong: most shapes are those of the
//! module, so that rules which compare tensors with each other are reached.

use std::sync::LazyLock;

use arbitrary::{Result, Unstructured};
use qwenlora_core::dtype::Dtype;
use qwenlora_core::key::role::Role;
use qwenlora_core::key::suffix;
use qwenlora_core::model::slot::{BlockBuild, MlpPath};
use qwenlora_core::model::{self, KnownModule, ModuleKind};
use qwenlora_core::stack::{LokrScale, StackOptions};

use crate::listing::Listing;
use crate::stack::{self, BLOCKS};
use crate::words::{FAMILIES, PREFIXES, SUFFIXES};

const MAX_MODULES: usize = 5;
const DTYPES: [Dtype; 8] = [
    Dtype::BF16,
    Dtype::F16,
    Dtype::F32,
    Dtype::F64,
    Dtype::F8E4M3,
    Dtype::F8E5M2,
    Dtype::I64,
    Dtype::Bool,
];
const VALUES: [f64; 12] = [
    1.0,
    8.0,
    16.0,
    0.5,
    0.0,
    -1.0,
    f64::INFINITY,
    f64::NAN,
    1e300,
    1e-300,
    f64::MAX,
    18_446_744_073_709_551_615.0,
];
const METADATA: [(&str, &str); 10] = [
    ("ss_network_alpha", "1"),
    ("ss_network_dim", "32"),
    ("ss_base_model_version", "mageflow"),
    (
        "lora_adapter_metadata",
        r#"{"transformer.lora_alpha": 8, "transformer.use_rslora": true}"#,
    ),
    (
        "lora_adapter_metadata",
        r#"{"lora_alpha": 1e308, "alpha_pattern": {"to_(q|k)": 0}}"#,
    ),
    (
        "lora_adapter_metadata",
        r#"{"peft_type": "LOKR", "alpha": 4, "r": 8, "rank_pattern": {"to_(q|k)": 2, "img_in": 0}}"#,
    ),
    (
        "lora_adapter_metadata",
        r#"{"peft_type": "LOHA", "alpha": 1e308, "bias": "all"}"#,
    ),
    (
        "lora_adapter_metadata",
        r#"{"transformer.lora_alpha": 8, "transformer.init_lora_weights": "pissa_niter_4"}"#,
    ),
    (
        "lora_adapter_metadata",
        r#"{"peft_type": "OFT", "use_cayley_neumann": false, "apply_GS": true}"#,
    ),
    ("lora_adapter_metadata", "{"),
];

/// The modules of the blocks that stacks are planned on, and those outside of blocks.
static NEAR: LazyLock<Vec<&KnownModule>> = LazyLock::new(|| {
    let is_near = |module: &&KnownModule| module.block.is_none_or(|block| BLOCKS.contains(&block));
    model::table().modules().iter().filter(is_near).collect()
});

/// Checks what the bytes choose.
pub fn check(bytes: &[u8]) {
    // Bytes that run out choose nothing more: `Unstructured` then gives zeros.
    let mut choice = Unstructured::new(bytes);
    let Ok((first, second, stack)) = draft(&mut choice) else {
        return;
    };
    let plans: Vec<_> = [first, second].iter().filter_map(Listing::check).collect();
    let plans: Vec<_> = plans.iter().collect();
    for build in [BlockBuild::Nunchaku, BlockBuild::Stock] {
        let slots = stack::slots(stack.base_rank, stack.offloaded, build);
        stack::check(&plans, &stack.strengths, &slots, stack.options);
    }
}

/// What is asked for beside the files.
struct Stack {
    base_rank: u64,
    offloaded: bool,
    strengths: [f64; 2],
    options: StackOptions,
}

fn draft(choice: &mut Unstructured) -> Result<(Listing, Listing, Stack)> {
    let stack = Stack {
        base_rank: *choice.choose(&[32, 128, 16, 1008, 1024, 2000])?,
        offloaded: choice.arbitrary()?,
        strengths: [1.0, *choice.choose(&[1.0, -0.5, 0.0, 1e300])?],
        options: StackOptions {
            max_rank: *choice.choose(&[None, Some(16), Some(1), Some(100), Some(u64::MAX)])?,
            strict: rarely(choice, 8)?,
            truncated_rank: *choice.choose(&[128, 1, 16, u64::MAX])?,
            lokr_scale: *choice.choose(&[LokrScale::Standard, LokrScale::Network])?,
            mlp: *choice.choose(&[MlpPath::Exact, MlpPath::Rank])?,
            dense_budget: *choice.choose(&[1 << 30, 0, 1 << 26, u64::MAX])?,
        },
    };
    Ok((lora(choice)?, lora(choice)?, stack))
}

fn lora(choice: &mut Unstructured) -> Result<Listing> {
    let mut listing = Listing::default();
    for _ in 0..choice.int_in_range(1..=MAX_MODULES)? {
        add_module(choice, &mut listing)?;
    }
    for pair in METADATA {
        if rarely(choice, 6)? {
            listing
                .metadata
                .push((pair.0.to_owned(), pair.1.to_owned()));
        }
    }
    Ok(listing)
}

fn add_module(choice: &mut Unstructured, listing: &mut Listing) -> Result<()> {
    let module = *choice.choose(&NEAR)?;
    let prefix = *choice.choose(&PREFIXES)?;
    let path = if prefix.ends_with('_') {
        module.path.replace('.', "_")
    } else {
        module.path.clone()
    };
    let mut suffixes = choice.choose(&FAMILIES)?.to_vec();
    if rarely(choice, 4)? {
        let lost = choice.choose_index(suffixes.len())?;
        suffixes.remove(lost);
    }
    while suffixes.len() < 12 && rarely(choice, 4)? {
        suffixes.push(choice.choose(&SUFFIXES)?);
    }
    let ranks = [choice.int_in_range(1..=40)?, choice.int_in_range(1..=40)?];
    let cut = *choice.choose(&[16, 1, 8, 48, 64, 7])?;
    let dtype = *choice.choose(&DTYPES)?;
    for suffix in suffixes {
        let role = suffix::cut(&format!("{path}{suffix}")).map(|cut| cut.role);
        let mut shape = shape(module.kind, role, ranks, cut);
        if rarely(choice, 12)? {
            spoil(choice, &mut shape)?;
        }
        let value = *choice.choose(&VALUES)?;
        listing.add(format!("{prefix}{path}{suffix}"), dtype, shape, Some(value));
    }
    Ok(())
}

/// The shape that a tensor of this role has at this module.
#[expect(clippy::match_same_arms, reason = "a family a line")]
fn shape(kind: ModuleKind, role: Option<Role>, ranks: [u64; 2], cut: u64) -> Vec<u64> {
    let (out, inp) = match kind {
        ModuleKind::Linear {
            out_features,
            in_features,
        } => (out_features, in_features),
        ModuleKind::Norm { channels } => (channels, 1),
        ModuleKind::Embedding { rows, dim } => (dim, rows),
    };
    let [rank, other] = ranks;
    // Small factors of the weight's sides, and what is left of them.
    let (out_small, in_small) = (cut.min(out), cut.min(inp));
    let (out_rest, in_rest) = (out / out_small, inp / in_small);
    match role {
        Some(Role::Down | Role::GloraA2 | Role::GloraB2) => vec![rank, inp],
        Some(Role::Up | Role::GloraB1) => vec![out, rank],
        Some(Role::GloraA1) => vec![inp, rank],
        Some(Role::Mid | Role::GloraBm) => vec![rank, rank],
        Some(Role::LokrW1) => vec![out_small, in_small],
        Some(Role::LokrW1A) => vec![out_small, other],
        Some(Role::LokrW1B) => vec![other, in_small],
        Some(Role::LokrW2) => vec![out_rest, in_rest],
        Some(Role::LokrW2A) => vec![out_rest, rank],
        Some(Role::LokrW2B) => vec![rank, in_rest],
        Some(Role::HadaW1A) => vec![out, rank],
        Some(Role::HadaW1B) => vec![rank, inp],
        Some(Role::HadaW2A) => vec![out, other],
        Some(Role::HadaW2B) => vec![other, inp],
        Some(Role::Diff | Role::SetWeight) => kind.weight_shape(),
        Some(Role::OftBlocks) => vec![out_rest, out_small, out_small],
        Some(Role::OftR) => vec![in_rest, in_small * in_small.saturating_sub(1) / 2],
        Some(Role::BoftR) => vec![1, in_rest, in_small, in_small],
        Some(Role::HraU) => vec![inp, rank],
        Some(Role::Ia3L) => vec![1, inp],
        Some(Role::DoraScale | Role::OftRescale | Role::BoftS) => vec![out, 1],
        Some(Role::UpBias | Role::DiffB | Role::BNorm | Role::WNorm | Role::Ia3) => vec![out],
        Some(Role::Reshape) => vec![2],
        _ => Vec::new(),
    }
}

/// True once in so many times, never where the bytes have run out.
fn rarely(choice: &mut Unstructured, times: u8) -> Result<bool> {
    Ok(choice.int_in_range(1..=times)? == times)
}

/// Makes a shape a wrong one.
fn spoil(choice: &mut Unstructured, shape: &mut Vec<u64>) -> Result<()> {
    const SIDES: [u64; 9] = [0, 1, 2, 3, 16, 3072, 12288, 1 << 32, u64::MAX];
    match choice.int_in_range(0..=4)? {
        0 => shape.reverse(),
        1 => shape.push(1),
        2 => {
            shape.pop();
        }
        3 => shape.push(*choice.choose(&SIDES)?),
        _ => {
            let side = *choice.choose(&SIDES)?;
            if let Some(at) = shape.len().checked_sub(1) {
                shape[choice.int_in_range(0..=at)?] = side;
            }
        }
    }
    Ok(())
}
