//! Choosing the next token.

use rand::distr::weighted::WeightedIndex;
use rand::prelude::*;

use anyhow::Result;

use crate::common::logits::{argmax, log_softmax};

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
}
