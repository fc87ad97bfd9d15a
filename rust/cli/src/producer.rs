//! Which program wrote a file: from its metadata where they say so, else from the style of its keys.

use qwenlora_core::model;
use qwenlora_core::plan::FilePlan;

use Sign::{Bare, KeyEnd, KeyPart, KeyStart, Lightning, Metadata, MetadataStart, Packed};

/// Rank and scale (alpha 8) of every Qwen-Image-Lightning file.
const LIGHTNING: (u64, f64) = (64, 0.125);

/// Something that a file shows.
#[derive(Debug, Clone, Copy)]
enum Sign {
    /// A metadata entry whose value holds this text.
    Metadata(&'static str, &'static str),
    /// A metadata entry whose name starts so.
    MetadataStart(&'static str),
    /// A key starts so.
    KeyStart(&'static str),
    /// A key holds this text.
    KeyPart(&'static str),
    /// A key ends so.
    KeyEnd(&'static str),
    /// A key starts with a block's path, without prefix.
    Bare,
    /// A pair is in Nunchaku's packed layout.
    Packed,
    /// All modules have Lightning's rank and scale.
    Lightning,
}

/// How much the signs of a row prove.
#[derive(Debug, Clone, Copy)]
enum Proof {
    /// The program names itself.
    Named(&'static str),
    /// No other program is known to write this.
    Likely(&'static str),
    /// Several programs do.
    Shared(&'static str),
}

use Proof::{Likely, Named, Shared};

/// The first row whose signs are all there decides.
const ROWS: &[(Proof, &[Sign])] = &[
    (Named("qwenlora merge"), &[Metadata("qwenlora.merge", "")]),
    (Named("ai-toolkit"), &[Metadata("software", "ai-toolkit")]),
    (Named("OneTrainer"), &[MetadataStart("ot_")]),
    (
        Named("LyCORIS in a kohya trainer"),
        &[Metadata("ss_network_module", "lycoris")],
    ),
    (
        Named("musubi-tuner"),
        &[Metadata("ss_network_module", "networks.lora_qwen_image")],
    ),
    (
        Named("musubi-tuner"),
        &[Metadata("ss_network_module", "networks.lora_zimage")],
    ),
    (
        Named("a kohya trainer"),
        &[Metadata("ss_network_module", "")],
    ),
    (
        Likely("OneTrainer"),
        &[
            Metadata("modelspec.implementation", "huggingface/diffusers"),
            MetadataStart("modelspec.architecture"),
        ],
    ),
    (
        Likely("SimpleTuner"),
        &[
            Metadata("lora_adapter_metadata", ""),
            KeyStart("diffusion_model."),
        ],
    ),
    (
        Named("diffusers with PEFT"),
        &[Metadata("lora_adapter_metadata", "")],
    ),
    (
        Likely("SimpleTuner"),
        &[KeyStart("transformer.base_model.model.")],
    ),
    (
        Likely("lightx2v's Qwen-Image-Lightning"),
        &[Lightning, Bare, KeyEnd(".lora_down.weight")],
    ),
    (Likely("Nunchaku's converter"), &[Packed]),
    (
        Likely("DiffSynth-Studio, saved again"),
        &[Bare, KeyPart(".lora_A.default_0.default.")],
    ),
    (
        Likely("DiffSynth-Studio"),
        &[Bare, KeyEnd(".lora_A.default.weight")],
    ),
    (
        Likely("a fork of DiffSynth-Studio"),
        &[KeyStart("pipe.dit.")],
    ),
    (
        Likely("qwen-image-finetune"),
        &[KeyPart(".lora_A.lora_edit.")],
    ),
    (Likely("VideoX-Fun"), &[KeyStart("lora_unet__")]),
    (Likely("OneTrainer"), &[KeyStart("lora_transformer_")]),
    (Likely("PEFT"), &[KeyStart("base_model.model.")]),
    (
        Shared("LyCORIS keys, as SimpleTuner writes"),
        &[KeyStart("lycoris_")],
    ),
    (
        Shared("kohya keys, as musubi-tuner and Civitai's trainer write"),
        &[KeyStart("lora_unet_")],
    ),
    (Shared("old diffusers keys"), &[KeyPart(".processor.")]),
    (
        Shared("old diffusers keys"),
        &[KeyPart(".lora_linear_layer.")],
    ),
    (
        Shared("a checkpoint's keys"),
        &[KeyStart("model.diffusion_model.")],
    ),
    (
        Shared("diffusers keys, as FlyMyAI's trainer writes"),
        &[KeyStart("transformer."), KeyEnd(".lora.down.weight")],
    ),
    (
        Shared("diffusers keys"),
        &[KeyStart("transformer."), KeyEnd(".lora_A.weight")],
    ),
    (
        Shared("ComfyUI keys, as its nodes and LightX2V's extractor write"),
        &[KeyStart("diffusion_model."), KeyEnd(".lora_down.weight")],
    ),
    (
        Shared("ComfyUI keys, as diffusion-pipe and many trainers write"),
        &[KeyStart("diffusion_model.")],
    ),
    (
        Shared("plain keys with a PEFT adapter name"),
        &[Bare, KeyEnd(".default.weight")],
    ),
    (
        Shared("plain keys, as VideoX-Fun and converters write"),
        &[Bare],
    ),
];

/// The producer in a few words, with the ground for saying so.
pub(crate) fn describe(plan: &FilePlan) -> String {
    let row = ROWS
        .iter()
        .find(|(_, signs)| signs.iter().all(|sign| shows(plan, *sign)));
    let Some((proof, signs)) = row else {
        return "unknown".to_owned();
    };
    match (proof, metadata_name(signs)) {
        (Named(name), Some(entry)) => format!("{name} (metadata `{entry}`)"),
        (Named(name), None) => (*name).to_owned(),
        (Likely(name), Some(entry)) => format!("probably {name} (metadata `{entry}`)"),
        (Likely(name), None) => format!("probably {name} (by its keys)"),
        (Shared(style), _) => format!("unknown ({style})"),
    }
}

fn metadata_name(signs: &[Sign]) -> Option<String> {
    signs.iter().find_map(|sign| match sign {
        Metadata(name, _) => Some((*name).to_owned()),
        MetadataStart(start) => Some(format!("{start}*")),
        _ => None,
    })
}

fn shows(plan: &FilePlan, sign: Sign) -> bool {
    let any_key = |test: &dyn Fn(&str) -> bool| {
        plan.table()
            .entries()
            .iter()
            .any(|entry| test(&entry.tensor.key))
    };
    match sign {
        Metadata(name, part) => plan
            .metadata()
            .iter()
            .any(|(key, value)| key == name && value.contains(part)),
        MetadataStart(start) => plan
            .metadata()
            .iter()
            .any(|(key, _)| key.starts_with(start)),
        KeyStart(start) => any_key(&|key| key.starts_with(start)),
        KeyPart(part) => any_key(&|key| key.contains(part)),
        KeyEnd(end) => any_key(&|key| key.ends_with(end)),
        Bare => any_key(&|key| {
            model::block_kinds().any(|blocks| {
                key.strip_prefix(blocks.path)
                    .is_some_and(|rest| rest.starts_with('.'))
            })
        }),
        Packed => plan
            .table()
            .entries()
            .iter()
            .any(|entry| entry.role == qwenlora_core::key::role::Role::PackedDown),
        Lightning => {
            let (rank, scale) = LIGHTNING;
            !plan.modules().is_empty()
                && plan
                    .modules()
                    .iter()
                    .all(|m| m.rank == Some(rank) && m.scale.total_cmp(&scale).is_eq())
        }
    }
}
