//! What a run ends with: a table, or the same as JSON.

use std::fmt;
use std::time::Duration;

use serde::Serialize;

/// Figures of a run; as JSON, exactly its fields.
#[derive(Debug, Serialize)]
pub struct Report {
    pub model: String,
    pub prompt_tokens: usize,
    pub generated_tokens: usize,
    pub text: String,
    pub prefill_s: f64,
    pub decode_tokens_per_s: f64,
    pub attended_fraction: f64,
    pub kv_bytes: usize,
    pub index_bytes: usize,
    #[serde(flatten)]
    pub comparison: Option<Comparison>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub check_kl: Option<f64>,
    /// For the table only.
    #[serde(skip)]
    pub index_time: Option<Duration>,
}

/// Sparse against dense, on the same tokens.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct Comparison {
    pub dense_decode_tokens_per_s: f64,
    pub speedup: f64,
    pub kl: f64,
    pub top1_agreement: f64,
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        let prefill_speed = self.prompt_tokens as f64 / self.prefill_s;
        let decode = if self.comparison.is_some() { "sparse decode" } else { "decode" };
        row(f, "model", &self.model)?;
        row(f, "prompt", format!("{} tokens", self.prompt_tokens))?;
        row(f, "generated", format!("{} tokens", self.generated_tokens))?;
        row(f, "prefill", format!("{prefill_speed:.0} tokens/s ({:.1} s)", self.prefill_s))?;
        if let Some(time) = self.index_time {
            row(f, "index built in", format!("{:.2} s", time.as_secs_f64()))?;
        }
        row(f, decode, format!("{:.1} tokens/s", self.decode_tokens_per_s))?;
        if let Some(comparison) = &self.comparison {
            row(f, "dense decode", format!("{:.1} tokens/s", comparison.dense_decode_tokens_per_s))?;
            row(f, "speedup", format!("{:.2}x", comparison.speedup))?;
        }
        row(f, "keys attended", format!("{:.2}%", 100. * self.attended_fraction))?;
        row(f, "K/V", megabytes(self.kv_bytes))?;
        row(f, "codes, codebooks", megabytes(self.index_bytes))?;
        if let Some(comparison) = &self.comparison {
            row(f, "KL(dense || sparse)", format!("{:.3e} nats a token", comparison.kl))?;
            row(f, "top-1 agreement", format!("{:.1}%", 100. * comparison.top1_agreement))?;
        }
        if let Some(kl) = self.check_kl {
            row(f, "KL to the check", format!("{kl:.3e} nats a token"))?;
        }
        Ok(())
    }
}

fn row(f: &mut fmt::Formatter, name: &str, value: impl fmt::Display) -> fmt::Result {
    writeln!(f, "{name:<20} {value}")
}

fn megabytes(bytes: usize) -> String {
    format!("{:.1} MB", bytes as f64 / 1e6)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report(comparison: Option<Comparison>) -> Report {
        Report {
            model: "smollm2".into(),
            prompt_tokens: 6000,
            generated_tokens: 128,
            text: "An \"owner\".\n".into(),
            prefill_s: 10.,
            decode_tokens_per_s: 50.,
            attended_fraction: 0.03,
            kv_bytes: 92_000_000,
            index_bytes: 4_000_000,
            comparison,
            check_kl: None,
            index_time: Some(Duration::from_secs(1)),
        }
    }

    const COMPARISON: Comparison =
        Comparison { dense_decode_tokens_per_s: 40., speedup: 1.25, kl: 0.02, top1_agreement: 0.92 };

    fn keys(report: &Report) -> Vec<String> {
        let json = serde_json::to_string(report).unwrap();
        let map: serde_json::Map<String, serde_json::Value> = serde_json::from_str(&json).unwrap();
        let mut keys: Vec<String> = map.keys().cloned().collect();
        keys.sort_by_key(|key| json.find(&format!("\"{key}\":")));
        keys
    }

    #[test]
    fn json_has_the_documented_fields() {
        let single = [
            "model",
            "prompt_tokens",
            "generated_tokens",
            "text",
            "prefill_s",
            "decode_tokens_per_s",
            "attended_fraction",
            "kv_bytes",
            "index_bytes",
        ];
        assert_eq!(keys(&report(None)), single);
        let both = [&single[..], &["dense_decode_tokens_per_s", "speedup", "kl", "top1_agreement"]].concat();
        assert_eq!(keys(&report(Some(COMPARISON))), both);
    }

    #[test]
    fn table_has_a_line_for_each_figure() {
        let table = report(None).to_string();
        assert!(table.contains("prefill              600 tokens/s (10.0 s)\n"), "{table}");
        assert!(table.contains("keys attended        3.00%\n") && table.contains("K/V                  92.0 MB\n"));
        assert!(!table.contains("speedup"));
        let table = report(Some(COMPARISON)).to_string();
        assert!(table.contains("speedup              1.25x\n") && table.contains("top-1 agreement      92.0%\n"));
    }
}
