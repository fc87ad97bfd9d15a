//! Cuts the suffix off a key: the longest that matches, anchored at the end.

use crate::key::peft_method;
use crate::key::role::Role;

/// A key cut in two, with what the suffix says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Cut<'k> {
    /// The key up to the suffix: prefixes and path.
    pub stem: &'k str,
    /// The tensor's part.
    pub role: Role,
    /// PEFT's adapter names between the role and `.weight`; empty where there are none.
    pub adapter_name: &'k str,
    /// For a float8 scale, the role of the tensor that it scales.
    pub scales: Option<Role>,
    /// Whether the suffix is a pair's without `.weight`: Nunchaku's packed tensors look so.
    pub bare: bool,
}

/// Most adapter names that may stand between a role and `.weight`.
const MAX_NAMES: usize = 2;

/// How a float8 scale ends, the longer before what it ends in.
const FLOAT8_SCALES: [&str; 3] = ["weight.scale_weight", "scale_weight", "weight_scale"];

/// Suffixes without an adapter name. Order does not matter: the longest match is taken.
const FIXED: &[(&str, Role)] = &[
    (".lora_down.weight", Role::Down),
    (".lora_up.weight", Role::Up),
    (".lora_down", Role::Down),
    (".lora_up", Role::Up),
    (".lora.down.weight", Role::Down),
    (".lora.up.weight", Role::Up),
    (".lora.down", Role::Down),
    (".lora.up", Role::Up),
    ("_lora.down.weight", Role::Down),
    ("_lora.up.weight", Role::Up),
    ("_lora.down", Role::Down),
    ("_lora.up", Role::Up),
    ("_lora_down.weight", Role::Down),
    ("_lora_up.weight", Role::Up),
    ("_lora_down", Role::Down),
    ("_lora_up", Role::Up),
    (".lora.A.weight", Role::Down),
    (".lora.B.weight", Role::Up),
    (".lora.A", Role::Down),
    (".lora.B", Role::Up),
    (".lora_linear_layer.down.weight", Role::Down),
    (".lora_linear_layer.up.weight", Role::Up),
    (".lora_mid.weight", Role::Mid),
    (".alpha", Role::Alpha),
    (".lora_alpha", Role::Alpha),
    (".scale", Role::Scale),
    (".dora_scale", Role::DoraScale),
    (".magnitude", Role::DoraScale),
    (".a1.weight", Role::GloraA1),
    (".a2.weight", Role::GloraA2),
    (".b1.weight", Role::GloraB1),
    (".b2.weight", Role::GloraB2),
    (".bm.weight", Role::GloraBm),
    (".oft_blocks", Role::OftBlocks),
    (".rescale", Role::OftRescale),
    (".oft_R.scaled_oft", Role::OftScaled),
    (".on_input", Role::Ia3OnInput),
    (".diff", Role::Diff),
    (".diff_b", Role::DiffB),
    (".w_norm", Role::WNorm),
    (".b_norm", Role::BNorm),
    (".set_weight", Role::SetWeight),
    (".reshape_weight", Role::Reshape),
    // Last, and only meaningful beside `.on_input`: the table of keys decides.
    (".weight", Role::Ia3),
];

/// The last bytes of one of [`FIXED`], compared first: few are equal in them.
#[derive(Clone, Copy)]
struct Tail {
    bytes: u64,
    mask: u64,
}

impl Tail {
    /// The last 8 bytes of a text, or all of it.
    const fn of(text: &str) -> Self {
        let text = text.as_bytes();
        let (mut tail, mut at) = (Self { bytes: 0, mask: 0 }, 0);
        while at < text.len() && at < 8 {
            tail.bytes |= (text[text.len() - 1 - at] as u64) << (56 - 8 * at);
            tail.mask |= 0xff << (56 - 8 * at);
            at += 1;
        }
        tail
    }
}

/// The tails of [`FIXED`].
const TAILS: [Tail; FIXED.len()] = {
    let (mut tails, mut at) = ([Tail { bytes: 0, mask: 0 }; FIXED.len()], 0);
    while at < FIXED.len() {
        tails[at] = Tail::of(FIXED[at].0);
        at += 1;
    }
    tails
};

/// Cuts `key`, or `None` where no suffix of the grammar ends it.
pub fn cut(key: &str) -> Option<Cut<'_>> {
    cut_named(key)
        .or_else(|| cut_scale(key))
        .or_else(|| cut_fixed(key))
}

/// The float8 scale of a tensor whose own suffix precedes the scale's.
fn cut_scale(key: &str) -> Option<Cut<'_>> {
    let scaled = FLOAT8_SCALES
        .iter()
        .find_map(|ending| ends_in_segment(key, ending)?.strip_suffix('.'))?;
    let cut = cut_fixed(scaled).filter(|cut| cut.role.is_factor())?;
    Some(Cut {
        role: Role::Fp8Scale,
        scales: Some(cut.role),
        bare: false,
        ..cut
    })
}

/// Whether a key is spelled as PEFT spells the halves of an embedding's pair.
pub fn is_peft_embedding(key: &str) -> bool {
    key.split('.')
        .any(|segment| matches!(segment, "lora_embedding_A" | "lora_embedding_B"))
}

fn cut_fixed(key: &str) -> Option<Cut<'_>> {
    let end = Tail::of(key);
    let (suffix, role) = FIXED
        .iter()
        .zip(TAILS)
        .filter(|(_, tail)| tail.bytes == end.bytes & tail.mask)
        .map(|(fixed, _)| fixed)
        .filter(|(s, _)| key.ends_with(s))
        .max_by_key(|(s, _)| s.len())?;
    let stem = key.strip_suffix(suffix)?;
    let bare = matches!(role, Role::Down | Role::Up) && !suffix.ends_with(".weight");
    Some(Cut {
        stem,
        role: *role,
        adapter_name: "",
        scales: None,
        bare,
    })
}

/// How the program that trains a tensor of a named segment holds it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Storage {
    /// The weight of a layer: `.weight` ends the key.
    Layer,
    /// A parameter by itself: an adapter's name may end the key.
    Parameter,
    /// Either.
    Both,
}

/// Segments after which adapter names may follow, with the role they name.
fn named_segment(segment: &str) -> Option<(Role, Storage)> {
    let parameter = |role| (role, Storage::Parameter);
    Some(match segment {
        "lora_A" | "lora_down" => (Role::Down, Storage::Layer),
        "lora_B" | "lora_up" => (Role::Up, Storage::Layer),
        // PEFT stores embedding halves and magnitudes as parameters, other programs as layers.
        "lora_embedding_A" => (Role::Down, Storage::Both),
        "lora_embedding_B" => (Role::Up, Storage::Both),
        "lora_magnitude_vector" => (Role::DoraScale, Storage::Both),
        "lokr_w1" => parameter(Role::LokrW1),
        "lokr_w1_a" => parameter(Role::LokrW1A),
        "lokr_w1_b" => parameter(Role::LokrW1B),
        "lokr_w2" => parameter(Role::LokrW2),
        "lokr_w2_a" => parameter(Role::LokrW2A),
        "lokr_w2_b" => parameter(Role::LokrW2B),
        "lokr_t2" => parameter(Role::LokrT2),
        "hada_w1_a" => parameter(Role::HadaW1A),
        "hada_w1_b" => parameter(Role::HadaW1B),
        "hada_w2_a" => parameter(Role::HadaW2A),
        "hada_w2_b" => parameter(Role::HadaW2B),
        "hada_t1" => parameter(Role::HadaT1),
        "hada_t2" => parameter(Role::HadaT2),
        "oft_R" => (Role::OftR, Storage::Layer),
        "boft_R" => parameter(Role::BoftR),
        "boft_s" => parameter(Role::BoftS),
        "ia3_l" => parameter(Role::Ia3L),
        "hra_u" => parameter(Role::HraU),
        _ => return None,
    })
}

/// The forms with adapter names: the first role segment fixes the role, what lies between it and
/// the last segment are names, whatever they are.
fn cut_named(key: &str) -> Option<Cut<'_>> {
    let dots = key.bytes().enumerate().filter(|(_, byte)| *byte == b'.');
    let mut dots = dots.map(|(at, _)| at).peekable();
    while let Some(dot) = dots.next() {
        let end = dots.peek().copied().unwrap_or(key.len());
        let (stem, segment) = (key.get(..dot)?, key.get(dot + 1..end)?);
        if let Some(named) = named_segment(segment) {
            return finish_named(stem, segment, named, key.get(end..)?);
        }
        if peft_method::of_segment(segment).is_some() {
            return Some(Cut {
                stem,
                role: Role::PeftOnly,
                adapter_name: "",
                scales: None,
                bare: false,
            });
        }
    }
    None
}

fn finish_named<'k>(
    stem: &'k str,
    segment: &str,
    (role, storage): (Role, Storage),
    tail: &'k str,
) -> Option<Cut<'k>> {
    let cut = |role, adapter_name, bare| {
        Some(Cut {
            stem,
            role,
            adapter_name,
            scales: None,
            bare: bare && matches!(role, Role::Down | Role::Up),
        })
    };
    let tail = tail.strip_prefix('.').unwrap_or(tail);
    // What stands before the last segment: nothing, or names that each end in a dot.
    let names_of = |before: &'k str| {
        let Some(names) = before.strip_suffix('.') else {
            return Some("");
        };
        let well_formed =
            names.split('.').count() <= MAX_NAMES && names.split('.').all(|name| !name.is_empty());
        well_formed.then_some(names)
    };
    if tail.is_empty() && role != Role::OftR {
        return cut(role, "", true);
    }
    if let Some(names) = FLOAT8_SCALES
        .iter()
        .find_map(|ending| ends_in_segment(tail, ending))
    {
        return Some(Cut {
            stem,
            role: Role::Fp8Scale,
            adapter_name: names_of(names)?,
            scales: role.is_factor().then_some(Some(role))?,
            bare: false,
        });
    }
    if storage != Storage::Parameter
        && let Some(adapter_name) = ends_in_segment(tail, "weight")
    {
        return cut(role, names_of(adapter_name)?, false);
    }
    if segment == "lora_B"
        && let Some(adapter_name) = ends_in_segment(tail, "bias")
    {
        return cut(Role::UpBias, names_of(adapter_name)?, false);
    }
    if storage != Storage::Layer && !tail.contains('.') {
        return cut(role, tail, true);
    }
    None
}

/// The text before `segment`, where the dotted `text` ends in it.
fn ends_in_segment<'t>(text: &'t str, segment: &str) -> Option<&'t str> {
    let before = text.strip_suffix(segment)?;
    (before.is_empty() || before.ends_with('.')).then_some(before)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn roles(key: &str) -> Option<(&str, Role, &str)> {
        cut(key).map(|c| (c.stem, c.role, c.adapter_name))
    }

    #[test]
    fn slots_are_any_names() {
        assert_eq!(
            roles("a.to_q.lora_A.weight"),
            Some(("a.to_q", Role::Down, ""))
        );
        assert_eq!(
            roles("a.to_q.lora_A.default.weight"),
            Some(("a.to_q", Role::Down, "default"))
        );
        assert_eq!(
            roles("a.to_q.lora_B.default_0.default.weight"),
            Some(("a.to_q", Role::Up, "default_0.default"))
        );
        assert_eq!(
            roles("a.to_q.lora_A.lora_edit.weight"),
            Some(("a.to_q", Role::Down, "lora_edit"))
        );
        // Not forms of the grammar: what is left is a plain weight at a path that no module has.
        for key in ["a.to_q.lora_A.1.2.3.weight", "a.to_q.lora_A..weight"] {
            assert_eq!(cut(key).map(|c| c.role), Some(Role::Ia3), "{key}");
        }
        assert_eq!(
            roles("a.to_q.lora_B.default.bias"),
            Some(("a.to_q", Role::UpBias, "default"))
        );
    }

    #[test]
    fn anchored_at_the_end() {
        assert_eq!(
            roles("model.diffusion_model.x.diff"),
            Some(("model.diffusion_model.x", Role::Diff, ""))
        );
        assert_eq!(roles("x.lora_Alpha"), None);
        assert_eq!(roles("x.lora_alpha"), Some(("x", Role::Alpha, "")));
        assert_eq!(roles("x.lokr_w1_a"), Some(("x", Role::LokrW1A, "")));
        assert_eq!(roles("x.lokr_w1"), Some(("x", Role::LokrW1, "")));
        assert_eq!(
            roles("x_to_q_lora.up.weight"),
            Some(("x_to_q", Role::Up, ""))
        );
        assert_eq!(
            roles("x.lora_magnitude_vector.default.weight"),
            Some(("x", Role::DoraScale, "default"))
        );
        assert_eq!(
            roles("x.lora_magnitude_vector"),
            Some(("x", Role::DoraScale, ""))
        );
        assert_eq!(
            roles("x.lora_embedding_A.default"),
            Some(("x", Role::Down, "default"))
        );
        assert_eq!(roles("nothing"), None);
        assert_eq!(roles(""), None);
    }

    #[test]
    fn scales_name_their_half() {
        let scale = cut("x.lora_A.scale_weight").unwrap();
        assert_eq!(
            (scale.role, scale.scales),
            (Role::Fp8Scale, Some(Role::Down))
        );
        let scale = cut("x.lora_B.weight_scale").unwrap();
        assert_eq!((scale.role, scale.scales), (Role::Fp8Scale, Some(Role::Up)));
        for (ending, adapter_name) in [
            ("lora_A.weight.scale_weight", ""),
            ("lora_A.default.weight_scale", "default"),
            ("lora_A.default.scale_weight", "default"),
            ("lora_A.default.weight.scale_weight", "default"),
            ("lora_A.a.b.weight.scale_weight", "a.b"),
        ] {
            let key = format!("x.{ending}");
            let scale = cut(&key).unwrap();
            assert_eq!(
                (scale.role, scale.scales),
                (Role::Fp8Scale, Some(Role::Down))
            );
            assert_eq!(
                (scale.stem, scale.adapter_name),
                ("x", adapter_name),
                "{key}"
            );
        }
    }

    #[test]
    fn parameters_of_peft_may_end_in_an_adapter_s_name() {
        assert_eq!(
            roles("a.to_q.lokr_w2_b.style"),
            Some(("a.to_q", Role::LokrW2B, "style"))
        );
        assert_eq!(
            roles("a.to_q.oft_R.default.weight"),
            Some(("a.to_q", Role::OftR, "default"))
        );
        assert_eq!(roles("a.to_q.ia3_l"), Some(("a.to_q", Role::Ia3L, "")));
        assert_eq!(roles("a.to_q.boft_s"), Some(("a.to_q", Role::BoftS, "")));
        assert!(!cut("a.to_q.lokr_w1").unwrap().bare);
        // A parameter is no layer, and names hold no dot.
        for key in ["a.to_q.lokr_w1.default.weight", "a.to_q.lokr_w1.a.b"] {
            assert_ne!(cut(key).map(|c| c.role), Some(Role::LokrW1), "{key}");
        }
    }

    #[test]
    fn kinds_of_peft_alone_are_known_by_a_segment() {
        for key in [
            "a.to_q.lora_E",
            "a.to_q.glora_A.default.Xd",
            "a.to_q.vera_lambda_b",
        ] {
            assert_eq!(roles(key), Some(("a.to_q", Role::PeftOnly, "")), "{key}");
        }
        assert_eq!(roles("vera_lambda_b"), None);
    }

    #[test]
    fn bare_pairs_are_marked() {
        assert!(cut("x.lora_down").unwrap().bare);
        assert!(cut("x.lora_A").unwrap().bare);
        assert!(cut("x.lora.A").unwrap().bare);
        assert_eq!(roles("x.lora.B"), Some(("x", Role::Up, "")));
        assert!(!cut("x.lora_down.weight").unwrap().bare);
    }
}
