//! With the feature `cuda`: compiles `kernels/*.cu` to PTX, which the crate embeds.

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    #[cfg(feature = "cuda")]
    cuda::build();
}

#[cfg(feature = "cuda")]
mod cuda {
    use std::path::{Path, PathBuf};

    use cudaforge::{CudaToolkit, KernelBuilder};

    /// The oldest nvcc that knows all that the kernels use.
    const NVCC: u32 = 12;

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
            .watch([kernels.join("common.cuh"), kernels.join("nearest.cuh")])
            .compute_cap_arch("80")
            .args(["-std=c++17", "-O3"])
            .build_ptx()
            .unwrap_or_else(|error| panic!("{error}\n{HINT}"));
        ptx.write(out.join("ptx.rs")).expect("a writable OUT_DIR");
    }
}
