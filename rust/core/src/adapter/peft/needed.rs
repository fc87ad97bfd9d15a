//! Letters that a path must have for a regular expression to match it: a look at them spares most
//! expressions of a table.

/// Parts of every text that an expression matches.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Needed {
    /// Somewhere in it.
    inside: String,
    /// At its end.
    end: String,
}

impl Needed {
    /// The text that an expression needs; none where its syntax is not plain enough to tell.
    pub(super) fn of(expression: &str) -> Self {
        runs(expression).unwrap_or_default()
    }

    /// Whether a text has it all.
    pub(super) fn is_in(&self, text: &str) -> bool {
        text.ends_with(&self.end) && text.contains(&self.inside)
    }
}

/// The longest run of letters outside of groups, and the last one where it ends the expression.
fn runs(expression: &str) -> Option<Needed> {
    let expression = expression.strip_prefix('^').unwrap_or(expression);
    let expression = expression.strip_suffix('$').unwrap_or(expression);
    let mut needed = Needed::default();
    let mut run = String::new();
    let mut rest = expression.chars();
    let mut depth = 0_usize;
    let mut is_repeated = false;
    while let Some(c) = rest.next() {
        // Of a repetition that is repeated, nothing may be left.
        let repeats = matches!(c, '*' | '?' | '+' | '{');
        if repeats && is_repeated {
            return None;
        }
        is_repeated = repeats;
        let letter = match c {
            // Escapes of letters are classes, numbers, properties.
            '\\' => {
                let next = rest.next()?;
                if matches!(next, 'd' | 'w' | 's' | 'D' | 'W' | 'S' | 'b' | 'B') {
                    None
                } else if next.is_ascii_punctuation() {
                    Some(next)
                } else {
                    return None;
                }
            }
            '(' => {
                // Flags change the meaning of what follows.
                let group = rest.as_str();
                if group.starts_with('?') && !group.starts_with("?:") {
                    return None;
                }
                depth += 1;
                None
            }
            ')' => {
                depth = depth.checked_sub(1)?;
                None
            }
            '[' => {
                skip_class(&mut rest)?;
                None
            }
            '|' if depth == 0 => return None,
            // The letter before it may be missing.
            '*' | '?' => {
                run.pop();
                None
            }
            '{' => {
                run.pop();
                rest.find(|c| *c == '}')?;
                None
            }
            '.' | '+' | '|' | '^' | '$' | ']' | '}' => None,
            c => Some(c),
        };
        match letter {
            Some(letter) if depth == 0 => run.push(letter),
            _ => needed.take(&mut run),
        }
    }
    if depth > 0 {
        return None;
    }
    needed.end.clone_from(&run);
    needed.take(&mut run);
    Some(needed)
}

impl Needed {
    /// Takes a run where it is the longest.
    fn take(&mut self, run: &mut String) {
        if run.len() > self.inside.len() {
            self.inside.clone_from(run);
        }
        run.clear();
    }
}

/// Skips the rest of a class of single letters and ranges.
fn skip_class(rest: &mut std::str::Chars<'_>) -> Option<()> {
    let mut is_first = true;
    loop {
        match rest.next()? {
            // Classes in classes, and brackets as letters.
            '[' => return None,
            ']' if is_first => return None,
            ']' => return Some(()),
            '\\' => {
                rest.next()?;
            }
            '^' if is_first => continue,
            _ => {}
        }
        is_first = false;
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use proptest::sample::select;
    use regex_lite::Regex;

    #[test]
    fn what_expressions_need() {
        for (expression, inside, end) in [
            (
                r"transformer_blocks\.7\.attn\.to_(q|k)",
                "transformer_blocks.7.attn.to_",
                "",
            ),
            (r".*\.to_q$", ".to_q", ".to_q"),
            (
                r"^transformer_blocks\.\d+\.attn\.to_q",
                "transformer_blocks.",
                ".attn.to_q",
            ),
            (r"blocks\.[0-9]\.x", "blocks.", ".x"),
            ("ab*c", "a", "c"),
            ("ab+c", "ab", "c"),
            ("ab{2}c?", "a", ""),
            ("ab+*c", "", ""),
            ("ab{2}?c", "", ""),
            ("a|b", "", ""),
            ("(?i)abc", "", ""),
            (r"\x41", "", ""),
            (r"[[:alpha:]]abc", "", ""),
            ("(abc", "", ""),
            ("", "", ""),
        ] {
            let expected = Needed {
                inside: inside.to_owned(),
                end: end.to_owned(),
            };
            assert_eq!(Needed::of(expression), expected, "{expression}");
        }
    }

    const WORDS: [&str; 26] = [
        "a", "b", ".", r"\.", "(", ")", "(?:", "|", "*", "+", "?", "{2}", "{1,2}", "[ab]", "[^a]",
        "[a-b]", r"\d", r"\w", "^", "$", "1", "_", "(?i)", r"[\]a]", "{0}", "ab",
    ];

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(2000))]

        /// Whatever an expression matches has what the expression is said to need.
        #[test]
        fn no_match_is_lost(
            words in prop::collection::vec(select(&WORDS[..]), 0..8),
            text in "[ab1_.]{0,8}",
        ) {
            let expression = words.concat();
            if let Ok(regex) = Regex::new(&format!(r"^(?:.*\.)?(?:{expression})$"))
                && regex.is_match(&text)
            {
                prop_assert!(Needed::of(&expression).is_in(&text), "{expression} on {text}");
            }
        }
    }
}
