//! Decode steps of the published PQCache indexer, reproduced: codes, scores, selection, weights, attention output.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use candle_core::{DType, Device, IndexOp, Result, Tensor};
use candle_pq_attn::ops::{self, Geometry, Selected};
use candle_pq_attn::{Codebook, Heavy, Metric, PqAttention, PqConfig, Tail};

struct Case {
    name: String,
    tensors: HashMap<String, Tensor>,
    numbers: HashMap<String, String>,
}

impl Case {
    fn load(path: &Path) -> Self {
        let bytes = std::fs::read(path).expect("a readable golden case");
        let (_, header) = safetensors::SafeTensors::read_metadata(&bytes).expect("a safetensors header");
        let numbers = header.metadata().clone().expect("the case's numbers in the metadata");
        let tensors = candle_core::safetensors::load(path, &Device::Cpu).expect("the case's tensors");
        Self { name: path.display().to_string(), tensors, numbers }
    }

    fn number(&self, name: &str) -> usize {
        self.numbers[name].parse().expect("a number")
    }

    fn tensor(&self, name: &str) -> &Tensor {
        &self.tensors[name]
    }

    fn config(&self) -> PqConfig {
        PqConfig {
            sink: self.number("sink"),
            window: self.number("window"),
            heavy: Heavy::Keys(self.number("heavy")),
            pq_dim: self.number("m"),
            pq_bits: self.number("bits"),
            init_offset: Some(self.number("init_offset")),
            metric: if self.numbers["metric"] == "ip" { Metric::InnerProduct } else { Metric::Euclidean },
            coarse: 0,
            tail: Tail::None,
            query_weights: false,
            ..PqConfig::default()
        }
    }

    fn codebook(&self) -> Result<Codebook> {
        let shape = (self.number("b"), self.number("h_kv"), self.number("m"));
        let phi = self.tensors.get("ip_phi").map(|phi| phi.reshape(shape)).transpose()?;
        Codebook::new(self.tensor("centroids").clone(), phi)
    }

    /// Golden codes, `[b, n, h_kv, m]`, as `[b, h_kv, n, m]`.
    fn codes(&self, name: &str) -> Result<Tensor> {
        self.tensor(name).transpose(1, 2)?.contiguous()
    }

    fn scale(&self) -> f32 {
        1.0 / (self.number("d") as f32).sqrt()
    }
}

fn cases() -> Vec<Case> {
    let bundled = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden");
    let folders = [Some(bundled), std::env::var_os("PQ_GOLDEN_DIR").map(PathBuf::from)];
    let mut paths: Vec<_> = folders
        .into_iter()
        .flatten()
        .flat_map(|folder| std::fs::read_dir(folder).expect("a folder of golden cases"))
        .map(|entry| entry.expect("a folder entry").path())
        .filter(|path| path.extension().is_some_and(|extension| extension == "safetensors"))
        .collect();
    paths.sort();
    assert!(paths.len() >= 12, "only {} golden cases found", paths.len());
    paths.iter().map(|path| Case::load(path)).collect()
}

/// The largest difference.
fn distance(a: &Tensor, b: &Tensor) -> Result<f32> {
    (a - b)?.abs()?.flatten_all()?.max(0)?.to_scalar()
}

fn assert_equal(case: &Case, what: &str, got: &Tensor, want: &Tensor) -> Result<()> {
    assert_eq!(got.dims(), want.dims(), "{}: {what}", case.name);
    let differ = got.ne(want)?.to_dtype(DType::U32)?.sum_all()?.to_scalar::<u32>()?;
    assert_eq!(differ, 0, "{}: {differ} of {} {what} differ", case.name, got.elem_count());
    Ok(())
}

/// The cases' earlier codes are given, not made from their keys: only this step's new keys show the encoder.
#[test]
fn codes_of_new_keys() -> Result<()> {
    for case in cases() {
        let (before, after) = (case.codes("codes_before")?, case.codes("codes_after")?);
        let (old, new) = (before.dim(2)?, after.dim(2)? - before.dim(2)?);
        assert_equal(&case, "earlier codes", &after.narrow(2, 0, old)?, &before)?;
        let keys = case.tensor("key").narrow(2, case.number("init_offset") + old, new)?;
        assert_equal(&case, "new codes", &case.codebook()?.encode(&keys)?.0, &after.narrow(2, old, new)?)?;
    }
    Ok(())
}

#[test]
fn scores() -> Result<()> {
    for case in cases() {
        let codes = case.codes("codes_after")?;
        let (got, want) = (
            ops::score(case.tensor("query"), &codes, &case.codebook()?.centroids()?)?,
            case.tensor("scores").narrow(2, 0, codes.dim(2)?)?,
        );
        for (b, h) in (0..case.number("b")).flat_map(|b| (0..case.number("h")).map(move |h| (b, h))) {
            let (got, want) = (got.i((b, h))?, want.i((b, h))?);
            let largest = want.abs()?.max(0)?.to_scalar::<f32>()?;
            let worst = distance(&got, &want)?;
            assert!(worst <= 1e-4 * largest, "{}: row {b} {h} is off by {worst} of {largest}", case.name);
        }
    }
    Ok(())
}

/// The golden top-k broke ties at random, ours go to the lower position: rows are equal but for such swaps.
#[test]
fn selected_positions() -> Result<()> {
    for case in cases() {
        let (config, n) = (case.config(), case.number("n"));
        let all_listed = case.tensor("sparse_list").dim(2)? == n;
        assert_eq!(config.is_dense(n), all_listed, "{}: dense fallback", case.name);
        if config.is_dense(n) {
            continue;
        }
        let candidates = config.candidates(n);
        let codes = case.codes("codes_after")?.narrow(2, 0, candidates.len())?;
        let scores = ops::score(case.tensor("query"), &codes, &case.codebook()?.centroids()?)?;
        let heavy = ops::topk(&scores, config.heavy.count(n))?;
        let geometry = Geometry { n, sink: config.sink, window: config.window, init_offset: candidates.start };
        let selected = ops::indices_and_weights(&heavy, geometry)?;
        assert_equal(&case, "lens", &selected.lens.to_dtype(DType::I64)?, case.tensor("sparse_len"))?;
        let want = case.tensor("sparse_list");
        let got = selected.indices.narrow(2, 0, want.dim(2)?)?.to_dtype(DType::I64)?;
        for (b, h) in (0..case.number("b")).flat_map(|b| (0..case.number("h")).map(move |h| (b, h))) {
            let len = selected.lens.i((b, h))?.to_scalar::<u32>()? as usize;
            let (got, want) = (got.i((b, h, ..len))?.to_vec1::<i64>()?, want.i((b, h, ..len))?.to_vec1::<i64>()?);
            assert!(got.is_sorted_by(|a, b| a < b), "{}: row {b} {h} does not ascend", case.name);
            let golden = case.tensor("scores").i((b, h))?.to_vec1::<f32>()?;
            let score = |t: &i64| golden[*t as usize - candidates.start];
            let ours: Vec<_> = got.iter().filter(|t| !want.contains(t)).collect();
            let theirs: Vec<_> = want.iter().filter(|t| !got.contains(t)).collect();
            for (ours, theirs) in ours.iter().zip(&theirs) {
                assert_eq!(score(ours), score(theirs), "{}: row {b} {h} takes {ours} for {theirs}", case.name);
                assert!(ours < theirs, "{}: row {b} {h} takes the higher position of a tie", case.name);
            }
        }
    }
    Ok(())
}

/// Weights and attention over the golden lists.
#[test]
fn weights_and_attention() -> Result<()> {
    for case in cases() {
        let (query, keys, values) = (case.tensor("query"), case.tensor("key"), case.tensor("value"));
        let indices = case.tensor("sparse_list").to_dtype(DType::U32)?;
        let lens = case.tensor("sparse_len").to_dtype(DType::U32)?;
        let weights = indices.ones_like()?.to_dtype(DType::F32)?;
        let selected = Selected { indices, lens, weights };
        let dense = ops::dense_weights(&selected, case.number("h"), case.number("n"))?;
        assert_equal(&case, "weights", &dense, case.tensor("weight_list"))?;
        let attended = ops::sparse_attend(query, keys, values, &selected, case.scale())?;
        let worst = distance(&attended.out.squeeze(2)?, case.tensor("attention_output"))?;
        assert!(worst <= 1e-4, "{}: output is off by {worst}", case.name);
    }
    Ok(())
}

/// Where the sequence is too short for a selection, attention is dense and nothing is encoded.
#[test]
fn dense_fallback() -> Result<()> {
    let cases: Vec<_> = cases().into_iter().filter(|case| case.config().is_dense(case.number("n"))).collect();
    assert!(!cases.is_empty());
    for case in cases {
        let (attn, n) = (PqAttention::new(case.config(), case.scale())?, case.number("n"));
        let (keys, values) = (case.tensor("key"), case.tensor("value"));
        let dims = [case.number("b"), case.number("h_kv"), case.number("d")];
        let mut cache = attn.new_cache(dims, n, DType::F32, &Device::Cpu)?;
        cache.set_codebook(case.codebook()?)?;
        cache.append(&keys.narrow(2, 0, n - 1)?, &values.narrow(2, 0, n - 1)?)?;
        let (key, value) = (keys.narrow(2, n - 1, 1)?, values.narrow(2, n - 1, 1)?);
        let out = attn.forward(case.tensor("query"), &key, &value, &mut cache)?;
        let worst = distance(&out.squeeze(2)?, case.tensor("attention_output"))?;
        assert!(worst <= 1e-4, "{}: output is off by {worst}", case.name);
        assert_eq!(cache.codes()?.dim(2)?, 0, "{}: nothing to encode", case.name);
    }
    Ok(())
}
