//! Names of wrappers in keys: a model that was wrapped when it was saved.
//!
//! The names are those under which PyTorch and its kin hold what they wrap. None is part of a
//! module's path in a known model.

use std::borrow::Cow;

/// Attributes under which wrappers hold a module, without leading `_`.
const WRAPPERS: [&str; 7] = [
    "fsdp_wrapped_module",
    "checkpoint_wrapped_module",
    "forward_module",
    "fpw_module",
    "dp_module",
    "orig_mod",
    "module",
];
/// A last part that all of them have, without its first letter: most keys hold none.
const IN_ALL: &str = "mod";
/// Most wrappers that are taken out of one name; real files stack three.
const MAX_WRAPPERS: usize = 8;

/// A path without the wrappers' names in it, and those names as they stand in it, in order.
///
/// A name stands where a segment does: between dots, or between `_` where dots were flattened.
pub(super) fn unwrap(path: &str) -> Option<(String, Vec<String>)> {
    if !path.contains(IN_ALL) {
        return None;
    }
    let mut names = Vec::new();
    let mut rest = Cow::Borrowed(path);
    while names.len() < MAX_WRAPPERS
        && let Some((without, name)) = unwrap_first(&rest)
    {
        names.push(name);
        rest = Cow::Owned(without);
    }
    (!names.is_empty()).then(|| (rest.into_owned(), names))
}

/// A pattern over paths without the wrappers' names before a dot in it: what it is matched with has
/// none. `module` alone may be meant otherwise.
pub(crate) fn unwrap_pattern(pattern: &str) -> String {
    let names = WRAPPERS.iter().filter(|name| **name != "module");
    names.fold(pattern.to_owned(), |pattern, name| {
        let escaped = pattern.replace(&format!(r"_{name}\."), "");
        escaped.replace(&format!("_{name}."), "")
    })
}

/// The path without its first wrapper, and the wrapper.
fn unwrap_first(path: &str) -> Option<(String, String)> {
    let (begin, end) = find(path.as_bytes())?;
    let (before, after) = (path.get(..begin)?, path.get(end..)?);
    // One separator stays: the first of those before the name.
    let own = before.trim_end_matches(is_separator);
    let joint = before.get(own.len()..)?.chars().next();
    let after = after.strip_prefix(is_separator).unwrap_or(after);
    let mut without = own.to_owned();
    if !own.is_empty() && !after.is_empty() {
        without.extend(joint);
    }
    without.push_str(after);
    let underscores = before.get(own.len()..)?.trim_start_matches('.');
    let shown = if underscores.is_empty() { "" } else { "_" };
    Some((without, format!("{shown}{}", path.get(begin..end)?)))
}

/// The place of the first name that is a segment of its own.
fn find(path: &[u8]) -> Option<(usize, usize)> {
    let is_joint = |byte: &u8| matches!(byte, b'.' | b'_');
    // Dots and `_` are the same, as in a module's path.
    let begins = |rest: &[u8], name: &[u8]| {
        let alike = |(own, byte): (&u8, &u8)| own == byte || (*own == b'.' && *byte == b'_');
        rest.len() >= name.len()
            && rest.iter().zip(name).all(alike)
            && rest.get(name.len()).is_none_or(is_joint)
    };
    let joints = path.iter().enumerate().filter(|(_, byte)| is_joint(byte));
    let mut starts = std::iter::once(0).chain(joints.map(|(at, _)| at + 1));
    starts.find_map(|at| {
        let rest = path.get(at..)?;
        let name = WRAPPERS.iter().find(|name| begins(rest, name.as_bytes()))?;
        Some((at, at + name.len()))
    })
}

fn is_separator(c: char) -> bool {
    matches!(c, '.' | '_')
}

#[cfg(test)]
mod tests {
    use super::*;

    fn unwrapped(path: &str) -> Option<(String, String)> {
        unwrap(path).map(|(path, names)| (path, names.join(" ")))
    }

    #[test]
    fn names_are_taken_out_wherever_they_stand() {
        for (path, without, names) in [
            ("_orig_mod.a.to_q", "a.to_q", "_orig_mod"),
            ("x._orig_mod.a.to_q", "x.a.to_q", "_orig_mod"),
            ("a.20._orig_mod.to_q", "a.20.to_q", "_orig_mod"),
            ("a.20.to_q._orig_mod", "a.20.to_q", "_orig_mod"),
            (
                "lora_unet__orig_mod_a_20_to_q",
                "lora_unet_a_20_to_q",
                "_orig_mod",
            ),
            ("lora_unet_orig_mod_a", "lora_unet_a", "_orig_mod"),
            ("lora_unet___orig_mod_a", "lora_unet_a", "_orig_mod"),
            ("a.orig.mod.to.q", "a.to.q", "orig.mod"),
            (
                "a._fsdp_wrapped_module.to_q",
                "a.to_q",
                "_fsdp_wrapped_module",
            ),
            (
                "module._orig_mod.a.3._checkpoint_wrapped_module._fsdp_wrapped_module.to_q",
                "a.3.to_q",
                "module _orig_mod _checkpoint_wrapped_module _fsdp_wrapped_module",
            ),
            ("_forward_module.module.a", "a", "_forward_module module"),
            ("_orig_mod", "", "_orig_mod"),
        ] {
            let expected = Some((without.to_owned(), names.to_owned()));
            assert_eq!(unwrapped(path), expected, "{path}");
        }
        for path in [
            "",
            "a.to_q",
            "img_mod.1",
            "x_mod_y",
            "submodule.a",
            "modules.a",
            "a.modulex",
        ] {
            assert_eq!(unwrapped(path), None, "{path}");
        }
    }

    #[test]
    fn many_names_stay_cheap() {
        let hostile = "_orig_mod.".repeat(100_000) + "a";
        let (rest, names) = unwrap(&hostile).expect("there are some");
        assert_eq!((rest.len(), names.len()), (hostile.len() - 80, 8));
    }
}
