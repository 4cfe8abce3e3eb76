//! Rows of logits, and distances between the distributions that they stand for.

/// Index of the largest value, the first of several.
pub fn argmax(values: &[f32]) -> u32 {
    let largest = (0..).zip(values).reduce(|best, next| if next.1 > best.1 { next } else { best });
    largest.map_or(0, |(index, _)| index)
}

/// `KL(p ‖ q)` in nats, of the distributions that two rows of logits stand for.
pub fn kl(p: &[f32], q: &[f32]) -> f64 {
    let log_probabilities = |logits: &[f32]| log_softmax(&logits.iter().map(|&l| f64::from(l)).collect::<Vec<_>>());
    log_probabilities(p).iter().zip(log_probabilities(q)).map(|(p, q)| p.exp() * (p - q)).sum()
}

/// Logarithms of the probabilities that a row of logits stands for.
pub fn log_softmax(logits: &[f64]) -> Vec<f64> {
    let max = logits.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let log_sum = max + logits.iter().map(|logit| (logit - max).exp()).sum::<f64>().ln();
    logits.iter().map(|logit| logit - log_sum).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kl_of_known_distributions() {
        let (p, q) = ([0.5f32, 0.5].map(f32::ln), [0.25f32, 0.75].map(f32::ln));
        let expected = 0.5 * (0.5f64 / 0.25).ln() + 0.5 * (0.5f64 / 0.75).ln();
        assert!((kl(&p, &q) - expected).abs() < 1e-7);
        assert_eq!(kl(&p, &p), 0.);
        // Logits are free up to a constant.
        assert!(kl(&p, &p.map(|l| l + 5.)).abs() < 1e-7);
    }
}
