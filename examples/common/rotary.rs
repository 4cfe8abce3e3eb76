//! Rotary position embedding, in the half-rotated layout of Hugging Face.

use candle_core::{DType, Device, Result, Tensor};

use crate::common::config::{ModelConfig, RopeScaling};

/// The sines and cosines of every position of the context.
pub struct Rotary {
    cos: Tensor, // [context, head_dim / 2]
    sin: Tensor,
}

impl Rotary {
    pub fn new(config: &ModelConfig, dtype: DType, device: &Device) -> Result<Self> {
        let frequencies = frequencies(config);
        let angles = (0..config.context).flat_map(|position| frequencies.iter().map(move |f| position as f64 * f));
        let factor = match config.rope_scaling {
            RopeScaling::LongRope { attention_factor, .. } => attention_factor,
            _ => 1.,
        };
        let rotation = |angle: f64| ((factor * angle.sin()) as f32, (factor * angle.cos()) as f32);
        let (sin, cos): (Vec<f32>, Vec<f32>) = angles.map(rotation).unzip();
        let table = |values| Tensor::from_vec(values, (config.context, frequencies.len()), device)?.to_dtype(dtype);
        Ok(Self { cos: table(cos)?, sin: table(sin)? })
    }

    /// The same for layers with a sliding window, where theirs differ.
    pub fn local(config: &ModelConfig, dtype: DType, device: &Device) -> Result<Option<Self>> {
        let config = config.local_rope_theta.map(|rope_theta| ModelConfig {
            rope_theta,
            rope_scaling: RopeScaling::None,
            ..config.clone()
        });
        config.map(|config| Self::new(&config, dtype, device)).transpose()
    }

    /// The rotations of `tokens` positions from `start` on.
    pub fn range(&self, start: usize, tokens: usize) -> Result<Rotations> {
        Ok(Rotations { cos: self.cos.narrow(0, start, tokens)?, sin: self.sin.narrow(0, start, tokens)? })
    }

    /// The rotations of `positions`, `[tokens]` u32, which may be known to the device alone.
    pub fn of(&self, positions: &Tensor) -> Result<Rotations> {
        Ok(Rotations { cos: self.cos.index_select(positions, 0)?, sin: self.sin.index_select(positions, 0)? })
    }
}

/// Those of some tokens.
pub struct Rotations {
    cos: Tensor, // [tokens, head_dim / 2]
    sin: Tensor,
}

impl Rotations {
    /// Rotates `x`, `[batch, heads, tokens, head_dim]`.
    pub fn apply(&self, x: &Tensor) -> Result<Tensor> {
        candle_nn::rotary_emb::rope(&x.contiguous()?, &self.cos, &self.sin)
    }
}

/// Radians a position, for each pair of elements of a head.
fn frequencies(config: &ModelConfig) -> Vec<f64> {
    let pairs = config.head_dim / 2;
    let plain = (0..pairs).map(|i| config.rope_theta.powf(-(i as f64) / pairs as f64));
    match &config.rope_scaling {
        RopeScaling::None => plain.collect(),
        RopeScaling::Linear(factor) => plain.map(|f| f / factor).collect(),
        RopeScaling::Divisors(divisors) | RopeScaling::LongRope { divisors, .. } => {
            plain.zip(divisors).map(|(f, divisor)| f / divisor).collect()
        }
        RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_context } => plain
            .map(|f| {
                // Slow frequencies are stretched, fast ones kept, those between interpolated: by how often a frequency
                // turns within the context that the model was first trained on.
                let turns = original_context * f / std::f64::consts::TAU;
                let keep = ((turns - low_freq_factor) / (high_freq_factor - low_freq_factor)).clamp(0., 1.);
                f * (keep + (1. - keep) / factor)
            })
            .collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::common::testing::tiny_config;

    #[test]
    fn llama3_scaling_keeps_fast_and_stretches_slow() {
        let mut config = ModelConfig { head_dim: 128, rope_theta: 500_000., ..tiny_config() };
        let plain = frequencies(&config);
        config.rope_scaling =
            RopeScaling::Llama3 { factor: 8., low_freq_factor: 1., high_freq_factor: 4., original_context: 8192. };
        let scaled = frequencies(&config);
        assert_eq!(scaled[0], plain[0]);
        assert_eq!(scaled[63], plain[63] / 8.);
        // Pair 30 turns 2.78 times in 8,192 positions, which is between 1 and 4.
        let turns = 8192. * plain[30] / std::f64::consts::TAU;
        let keep = (turns - 1.) / 3.;
        assert!((scaled[30] - ((1. - keep) * plain[30] / 8. + keep * plain[30])).abs() < 1e-12);
        assert!(scaled.iter().zip(&plain).all(|(s, p)| s <= p && *s >= p / 8.));
    }

    #[test]
    fn linear_scaling_and_divisors_divide() {
        let mut config = tiny_config();
        let plain = frequencies(&config);
        config.rope_scaling = RopeScaling::Linear(4.);
        let linear = frequencies(&config);
        config.rope_scaling = RopeScaling::Divisors(vec![4.; plain.len()]);
        assert_eq!(frequencies(&config), linear);
        assert!(linear.iter().zip(&plain).all(|(l, p)| *l == p / 4.));
    }
}
