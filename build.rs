//! With the feature `cuda`: compiles `kernels/*.cu` to PTX and assembles that for one device; the crate embeds both.

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    #[cfg(feature = "cuda")]
    cuda::build();
}

#[cfg(feature = "cuda")]
mod cuda {
    use std::fmt::Write;
    use std::path::{Path, PathBuf};
    use std::process::Command;

    use cudaforge::{detect_compute_cap, CudaToolkit, KernelBuilder};

    /// The oldest nvcc that knows all that the kernels use.
    const NVCC: u32 = 12;

    /// The oldest device that the kernels run on.
    const CAPABILITY: usize = 80;

    const HINT: &str = "the feature `cuda` needs nvcc of CUDA 12 or later: install the CUDA toolkit, or run \
                        scripts/cuda-toolkit.sh, which does so without root, and put nvcc on the PATH";

    pub fn build() {
        let toolkit = CudaToolkit::detect().unwrap_or_else(|error| panic!("{error}\n{HINT}"));
        if let Some(version) = &toolkit.version {
            let major = version.split('.').next().and_then(|major| major.parse::<u32>().ok());
            assert!(major.is_none_or(|major| major >= NVCC), "found nvcc {version}\n{HINT}");
        }
        let kernels = Path::new("kernels");
        println!("cargo:rerun-if-changed=kernels");
        println!("cargo:rerun-if-env-changed=CUDA_HOME");
        let out = PathBuf::from(std::env::var_os("OUT_DIR").expect("cargo sets OUT_DIR"));
        // Compute capability 8.0 whatever the machine here has: its PTX runs on that and all later devices.
        let ptx = KernelBuilder::new()
            .source_dir(kernels)
            .watch(
                ["common.cuh", "histogram.cuh", "make_tables.cuh", "nearest.cuh", "tables.cuh", "decode"]
                    .map(|headers| kernels.join(headers)),
            )
            .compute_cap_arch(&CAPABILITY.to_string())
            .args(["-std=c++17", "-O3"])
            .build_ptx()
            .unwrap_or_else(|error| panic!("{error}\n{HINT}"));
        ptx.write(out.join("ptx.rs")).expect("a writable OUT_DIR");
        let ptxas = toolkit.nvcc_path.with_file_name("ptxas");
        std::fs::write(out.join("cubin.rs"), assemble(&ptxas, kernels, &out)).expect("a writable OUT_DIR");
    }

    /// Assembles the PTX for the device of CUDA_COMPUTE_CAP, or else of this machine, as Candle does with its kernels: a
    /// driver takes 10 seconds to do it when a process starts. Returns Rust source that embeds the result.
    fn assemble(ptxas: &Path, kernels: &Path, out: &Path) -> String {
        let capability = detect_compute_cap().map_or(0, |arch| arch.base);
        let is_known = capability >= CAPABILITY;
        let mut source = format!("pub const CAPABILITY: usize = {};\n", if is_known { capability } else { 0 });
        let files = std::fs::read_dir(kernels).expect("a folder of kernels");
        let mut jobs = Vec::new();
        for path in files.map(|file| file.expect("a folder entry").path()) {
            let (Some(name), true) =
                (path.file_stem().and_then(|name| name.to_str()), path.extension().is_some_and(|x| x == "cu"))
            else {
                continue;
            };
            let cubin = out.join(name).with_extension("cubin");
            if is_known {
                let mut command = Command::new(ptxas);
                command.arg(format!("-arch=sm_{capability}")).arg(out.join(name).with_extension("ptx"));
                let job =
                    command.arg("-o").arg(&cubin).spawn().unwrap_or_else(|error| panic!("ptxas: {error}\n{HINT}"));
                jobs.push((name.to_string(), job));
            } else {
                std::fs::write(&cubin, []).expect("a writable OUT_DIR");
            }
            let constant = name.to_uppercase();
            writeln!(source, "pub const {constant}: &[u8] = include_bytes!({cubin:?});").expect("a String");
        }
        for (name, mut job) in jobs {
            let status = job.wait().expect("a child process");
            assert!(status.success(), "ptxas: {name} does not assemble for compute capability {capability}: {status}");
        }
        source
    }
}
