//! The reason that is given most often.

use std::collections::HashMap;

/// A reason with how many it concerns and one of them.
pub(super) struct Tally {
    pub(super) count: usize,
    pub(super) example: String,
}

/// The reason that concerns the most, the earliest of equals, so that a file always says the same.
pub(super) fn most_common(rows: impl Iterator<Item = (String, String)>) -> Option<(String, Tally)> {
    let mut order: Vec<String> = Vec::new();
    let mut tallies: HashMap<String, Tally> = HashMap::new();
    for (reason, example) in rows {
        tallies
            .entry(reason)
            .or_insert_with_key(|reason| {
                order.push(reason.clone());
                Tally { count: 0, example }
            })
            .count += 1;
    }
    let most = tallies.values().map(|tally| tally.count).max()?;
    let reason = order
        .into_iter()
        .find(|r| tallies.get(r).is_some_and(|tally| tally.count == most))?;
    tallies.remove_entry(&reason)
}
