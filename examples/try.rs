use margay::*;
struct P;
impl progress::Progress for P {
    fn say(&self, l: &str) {
        eprintln!("{l}")
    }
    fn warn(&self, l: &str) {
        eprintln!("warn {l}")
    }
    fn begin(&self, s: &str, t: u64, d: u64, u: &'static str) {
        eprintln!("[{s}] {d}/{t} {u}")
    }
    fn end(&self, s: &str) {
        eprintln!("   {s}")
    }
}
fn main() {
    std::thread::Builder::new()
        .stack_size(256 << 20)
        .spawn(|| {
            let a: Vec<String> = std::env::args().collect();
            let r = recipe::Recipe::load(&a[2], &a[4..]).unwrap();
            let o = convert::Options {
                model: a[1].clone(),
                recipe: r,
                out: a[3].clone().into(),
                device: candle_core::Device::Cpu,
                until: None,
                restart: true,
                tensorboard: None,
                timed: false,
            };
            let t = std::time::Instant::now();
            match convert::convert(&o, &P) {
                Ok(c) => {
                    let r = c.report.unwrap();
                    for s in &r.stages {
                        println!("{:12} {:?}", s.name, s.quality)
                    }
                    for k in &r.checks {
                        println!("{:?}", k)
                    }
                    println!("{:?}", r.linear_shares);
                    for s in &r.speeds {
                        println!("{s:?}")
                    }
                }
                Err(e) => println!("error: {e}\nhint: {:?}", e.hint),
            }
            println!("{:?}", t.elapsed());
        })
        .unwrap()
        .join()
        .unwrap()
}
