//! Choosing the next token, and distances between distributions of it.

use rand::distr::weighted::WeightedIndex;
use rand::prelude::*;

use anyhow::Result;

/// Draws tokens at a temperature from the likeliest ones that together have probability `top_p`; seeded.
pub struct Sampler {
    rng: StdRng,
    temperature: f64,
    top_p: f64,
}

impl Sampler {
    pub fn new(seed: u64, temperature: f64, top_p: f64) -> Self {
        Self { rng: StdRng::seed_from_u64(seed), temperature, top_p }
    }

    pub fn sample(&mut self, logits: &[f32]) -> Result<u32> {
        if self.temperature == 0. {
            return Ok(argmax(logits));
        }
        let scaled: Vec<f64> = logits.iter().map(|&logit| f64::from(logit) / self.temperature).collect();
        let mut ranked: Vec<(u32, f64)> = (0..).zip(log_softmax(&scaled).into_iter().map(f64::exp)).collect();
        if self.top_p < 1. {
            ranked.sort_by(|a, b| b.1.total_cmp(&a.1));
            let mut mass = 0.;
            ranked.retain(|(_, probability)| {
                let keep = mass < self.top_p;
                mass += probability;
                keep
            });
        }
        let choice = WeightedIndex::new(ranked.iter().map(|(_, probability)| probability))?;
        Ok(ranked[choice.sample(&mut self.rng)].0)
    }
}

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

fn log_softmax(logits: &[f64]) -> Vec<f64> {
    let max = logits.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let log_sum = max + logits.iter().map(|logit| (logit - max).exp()).sum::<f64>().ln();
    logits.iter().map(|logit| logit - log_sum).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn temperature_zero_is_argmax() -> Result<()> {
        assert_eq!(Sampler::new(0, 0., 1.).sample(&[0., 3., 3., -1.])?, 1);
        Ok(())
    }

    #[test]
    fn a_seed_draws_the_same_tokens() -> Result<()> {
        let draw = |seed| -> Result<Vec<u32>> {
            let mut sampler = Sampler::new(seed, 1., 1.);
            (0..50).map(|_| sampler.sample(&[0.; 100])).collect()
        };
        assert_eq!(draw(1)?, draw(1)?);
        assert_ne!(draw(1)?, draw(2)?);
        Ok(())
    }

    #[test]
    fn frequencies_follow_the_distribution() -> Result<()> {
        let (mut sampler, mut counts) = (Sampler::new(7, 0.5, 1.), [0; 2]);
        for _ in 0..10_000 {
            counts[sampler.sample(&[0., 3f32.ln() / 2.])? as usize] += 1;
        }
        assert!((7_300..7_700).contains(&counts[1]), "{counts:?}");
        Ok(())
    }

    #[test]
    fn top_p_keeps_the_likeliest() -> Result<()> {
        let logits = [0.1f32, 0.5, 0.4].map(f32::ln);
        for (top_p, allowed) in [(0.4, &[1][..]), (0.6, &[1, 2]), (1., &[0, 1, 2])] {
            let mut sampler = Sampler::new(3, 1., top_p);
            let mut seen: Vec<u32> = (0..500).map(|_| sampler.sample(&logits)).collect::<Result<_>>()?;
            seen.sort();
            seen.dedup();
            assert_eq!(seen, allowed, "top_p {top_p}");
        }
        Ok(())
    }

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
