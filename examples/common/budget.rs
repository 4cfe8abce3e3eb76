//! Budgets of selected keys that some layers have of their own.

use std::fmt;
use std::ops::RangeInclusive;
use std::str::FromStr;

use candle_pq_attn::Heavy;

use super::cli::heavy;

/// As on the command line: `0-3=5%`, or `10=512` of a single layer.
#[derive(Debug, Clone, PartialEq)]
pub struct LayerBudget {
    pub layers: RangeInclusive<usize>,
    pub heavy: Heavy,
}

impl FromStr for LayerBudget {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let expected = || format!("expected layers and what they select, such as 0-3=5% or 10=512; got {text:?}");
        let (layers, budget) = text.split_once('=').ok_or_else(expected)?;
        let (first, last) = layers.split_once('-').unwrap_or((layers, layers));
        let number = |layer: &str| layer.trim().parse::<usize>().map_err(|_| expected());
        let layers = number(first)?..=number(last)?;
        if layers.is_empty() {
            return Err(format!("expected the first layer before the last, got {text:?}"));
        }
        Ok(Self { layers, heavy: heavy(budget)? })
    }
}

impl fmt::Display for LayerBudget {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        match (self.layers.start(), self.layers.end()) {
            (first, last) if first == last => write!(f, "{first}={}", self.heavy),
            (first, last) => write!(f, "{first}-{last}={}", self.heavy),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn layers_and_their_budget() {
        for (text, layers, heavy) in [("0-3=5%", 0..=3, Heavy::Fraction(0.05)), ("10=512", 10..=10, Heavy::Keys(512))] {
            let budget: LayerBudget = text.parse().unwrap();
            assert_eq!(budget, LayerBudget { layers, heavy });
            assert_eq!(budget.to_string(), text);
        }
    }

    #[test]
    fn what_is_none_says_what_one_is() {
        for (text, expected) in [
            ("5%", "expected layers and what they select, such as 0-3=5% or 10=512; got \"5%\""),
            ("=5%", "got \"=5%\""),
            ("1-=5%", "got \"1-=5%\""),
            ("1-2-3=5%", "got \"1-2-3=5%\""),
            ("3-1=5%", "expected the first layer before the last, got \"3-1=5%\""),
            ("1=0", "at least 1 key"),
            ("1=101%", "at most 100%"),
            ("1=", "a number of keys such as 512 or a share such as 2%"),
        ] {
            let error = text.parse::<LayerBudget>().unwrap_err();
            assert!(error.contains(expected), "{text}: {error}");
        }
    }
}
