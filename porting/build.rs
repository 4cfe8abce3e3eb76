//! Applies each diff of docs/porting.md to the module of candle-transformers that it is about, so that the guide cannot
//! say what no longer compiles.

use std::path::{Path, PathBuf};
use std::{env, fs};

use anyhow::{ensure, Context, Result};
use cargo_metadata::MetadataCommand;

const GUIDE: &str = "../docs/porting.md";
const MODELS: [&str; 3] = ["llama", "qwen3", "quantized_qwen3"];

fn main() -> Result<()> {
    println!("cargo:rerun-if-changed=build.rs");
    println!("cargo:rerun-if-changed={GUIDE}");
    // Another version of candle-transformers may have been locked.
    println!("cargo:rerun-if-changed=../Cargo.lock");
    let guide = fs::read_to_string(GUIDE).with_context(|| format!("cannot read the guide, {GUIDE}"))?;
    let (models, version) = candle_transformers_models()?;
    let out_dir = PathBuf::from(env::var("OUT_DIR")?);
    for model in MODELS {
        let ported = port(&models, model, &guide).with_context(|| {
            format!("the port of candle-transformers {version} in {GUIDE}, models/{model}.rs, is not true any more")
        })?;
        fs::write(out_dir.join(format!("{model}.rs")), ported)?;
    }
    Ok(())
}

/// The folder of the models' sources, where Cargo has put them, and the version that they are of.
fn candle_transformers_models() -> Result<(PathBuf, String)> {
    // Without the platform Cargo would download what other platforms need.
    let platform = ["--filter-platform".to_string(), env::var("TARGET")?];
    let metadata = MetadataCommand::new()
        .other_options(platform)
        .exec()
        .context("cannot ask Cargo where candle-transformers is: does `cargo metadata` run in porting/?")?;
    let package = metadata.packages.iter().find(|package| package.name == "candle-transformers");
    let package = package.context("candle-transformers is no dependency: add it to porting/Cargo.toml")?;
    let models = package.manifest_path.with_file_name("src").join("models");
    Ok((models.into_std_path_buf(), package.version.to_string()))
}

/// The source of one model with its diff applied, as it compiles outside of candle-transformers.
fn port(models: &Path, model: &str, guide: &str) -> Result<String> {
    let path = models.join(format!("{model}.rs"));
    let original = fs::read_to_string(&path).with_context(|| {
        format!("cannot read {}: has the model moved? Then remove or rename its diff", path.display())
    })?;
    let diff = diff_of(model, guide)?;
    let patch = diffy::Patch::from_str(diff)
        .context("the diff is malformed: make it anew with `git diff --no-index --no-prefix --patience -U2 a b`")?;
    let ported = diffy::apply(&original, &patch).context(
        "the diff does not apply: apply it by hand with `patch`, settle what it rejects, and put the new diff into the \
         guide",
    )?;
    // An included file may have no inner documentation.
    let ported = ported.replace("//!", "//");
    // The same as the guide tells its readers to do.
    Ok(ported.replace("crate::", "candle_transformers::").replace("super::", "candle_transformers::models::"))
}

fn diff_of<'a>(model: &str, guide: &'a str) -> Result<&'a str> {
    let header = format!("--- a/models/{model}.rs\n");
    let mut diffs = guide.split("```diff\n").skip(1).filter(|fence| fence.starts_with(&header));
    let fence = diffs.next().with_context(|| format!("the guide has no ```diff fence that begins with {header:?}"))?;
    ensure!(diffs.next().is_none(), "the guide has two ```diff fences that begin with {header:?}: remove one");
    let (diff, _) = fence.split_once("```").context("the ```diff fence has no end: add ```")?;
    Ok(diff)
}
