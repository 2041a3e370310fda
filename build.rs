//! Compiles `kernels/*.cu` into one static library where the feature `cuda` is on; does nothing otherwise.
//!
//! `CUDA_HOME` (or `CUDA_PATH`, or `nvcc` on the PATH) names the toolkit. `MARGAY_CUDA_ARCHS` narrows the machine code that is
//! built, say `90a` alone while working on a kernel; by default code for Ampere (80), Ada (89) and Hopper (90a) is built,
//! and PTX of 90 for newer chips.

use std::env;
use std::error::Error;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Mutex;

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rerun-if-changed=kernels");
    if env::var_os("CARGO_FEATURE_CUDA").is_none() {
        return Ok(());
    }
    for name in ["CUDA_HOME", "CUDA_PATH", "MARGAY_CUDA_ARCHS"] {
        println!("cargo::rerun-if-env-changed={name}");
    }
    let toolkit = env::var_os("CUDA_HOME").or_else(|| env::var_os("CUDA_PATH")).map(PathBuf::from);
    let nvcc = toolkit.as_ref().map_or("nvcc".into(), |t| t.join("bin/nvcc"));
    let out = PathBuf::from(env::var_os("OUT_DIR").ok_or("OUT_DIR is not set")?);

    let mut sources: Vec<PathBuf> =
        std::fs::read_dir("kernels")?.map(|e| e.map(|e| e.path())).collect::<Result<_, _>>()?;
    sources.retain(|path| path.extension().is_some_and(|e| e == "cu"));
    sources.sort();
    let objects: Vec<PathBuf> =
        sources.iter().map(|s| out.join(s.file_stem().unwrap_or_default()).with_extension("o")).collect();

    // One nvcc per job that cargo allows; the order of compilation does not matter.
    let queue = Mutex::new(sources.iter().zip(&objects));
    let failures = Mutex::new(Vec::new());
    let jobs = env::var("NUM_JOBS").ok().and_then(|n| n.parse().ok()).unwrap_or(1usize);
    std::thread::scope(|scope| {
        for _ in 0..jobs {
            scope.spawn(|| {
                // The lock is free again before the compiler starts.
                let next = || queue.lock().ok().and_then(|mut queue| queue.next());
                while let Some((source, object)) = next() {
                    if let Err(e) = compile(&nvcc, source, object)
                        && let Ok(mut failures) = failures.lock()
                    {
                        failures.push(format!("{}: {e}", source.display()));
                    }
                }
            });
        }
    });
    let failures = failures.into_inner().map_err(|_| "a compiler thread panicked")?;
    if !failures.is_empty() {
        return Err(failures.join("\n").into());
    }

    let library = out.join("libmargay_kernels.a");
    // ar adds to what is there; a kernel that was removed must not stay.
    let _ = std::fs::remove_file(&library);
    let status = Command::new("ar").arg("crs").arg(&library).args(&objects).status()?;
    if !status.success() {
        return Err("ar could not make the kernel library".into());
    }
    println!("cargo::rustc-link-search=native={}", out.display());
    println!("cargo::rustc-link-lib=static=margay_kernels");
    for folder in toolkit.iter().flat_map(|t| ["lib64", "lib"].map(|lib| t.join(lib))).filter(|f| f.is_dir()) {
        println!("cargo::rustc-link-search=native={}", folder.display());
    }
    println!("cargo::rustc-link-lib=dylib=cudart");
    Ok(())
}

fn compile(nvcc: &Path, source: &Path, object: &Path) -> Result<(), Box<dyn Error + Send + Sync>> {
    let archs = env::var("MARGAY_CUDA_ARCHS").unwrap_or_else(|_| "80,89,90a,90+ptx".into());
    let mut command = Command::new(nvcc);
    command.args(["-c", "-O3", "-std=c++17", "-Xcompiler", "-fPIC,-fno-exceptions"]);
    for arch in archs.split(',') {
        command.arg(match arch.strip_suffix("+ptx") {
            Some(arch) => format!("-gencode=arch=compute_{arch},code=compute_{arch}"),
            None => format!("-gencode=arch=compute_{arch},code=sm_{arch}"),
        });
    }
    let output = command.arg(source).arg("-o").arg(object).output().map_err(|e| format!("cannot run nvcc: {e}"))?;
    if !output.status.success() {
        return Err(String::from_utf8_lossy(&output.stderr).into_owned().into());
    }
    Ok(())
}
