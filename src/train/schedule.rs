//! How the learning rate moves, as a factor of its peak.

use serde::{Deserialize, Serialize};

use crate::recipe::Schedule;

/// A schedule with its memory.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Rate {
    schedule: Schedule,
    steps: u64,
    /// Peak learning rate.
    peak: f64,
    /// Plateau: factor reached, best validation loss, evaluations without improvement since.
    factor: f64,
    best: Option<f64>,
    flat: usize,
}

/// Relative improvement below which an evaluation counts as flat.
const THRESHOLD: f64 = 1e-4;

impl Rate {
    pub fn new(schedule: &Schedule, steps: u64, peak: f64) -> Self {
        Rate { schedule: schedule.clone(), steps, peak, factor: 1.0, best: None, flat: 0 }
    }

    /// Factor of the update that follows `step` finished ones.
    pub fn at(&self, step: u64) -> f64 {
        use Schedule::*;
        let (Constant { warmup }
        | Linear { warmup, .. }
        | Cosine { warmup, .. }
        | Wsd { warmup, .. }
        | Plateau { warmup, .. }) = self.schedule;
        let rise = (warmup * self.steps as f64).round();
        if (step as f64) < rise {
            return (step + 1) as f64 / rise;
        }
        // Share of the steps from `start` to the last that are done.
        let done = |start: f64| ((step as f64 - start) / (self.steps as f64 - start).max(1.0)).max(0.0);
        match self.schedule {
            Constant { .. } => 1.0,
            Plateau { .. } => self.factor,
            Linear { floor, .. } => floor + (1.0 - floor) * (1.0 - done(rise)),
            Cosine { floor, .. } => floor + (1.0 - floor) * 0.5 * (1.0 + (std::f64::consts::PI * done(rise)).cos()),
            Wsd { decay, floor, .. } => {
                let start = self.steps as f64 - (decay * self.steps as f64).round();
                floor + (1.0 - floor) * (1.0 - done(start))
            }
        }
    }

    /// Takes note of a validation loss. The plateau rule is PyTorch's `ReduceLROnPlateau` with a relative threshold of
    /// 1e-4 and no cooldown.
    pub fn observe(&mut self, loss: f64) {
        let Schedule::Plateau { factor, patience, min_lr, .. } = self.schedule else { return };
        if self.best.is_none_or(|best| loss < best * (1.0 - THRESHOLD)) {
            self.best = Some(loss);
            self.flat = 0;
            return;
        }
        self.flat += 1;
        if self.flat > patience {
            self.factor = (self.factor * factor).max((min_lr / self.peak).min(1.0));
            self.flat = 0;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn plateau_drops_on_the_twelfth_flat_evaluation_counted_from_the_best() {
        let mut rate = Rate::new(&Schedule::plateau(), 1000, 1e-2);
        rate.observe(1.0);
        let drops: Vec<bool> = (0..24)
            .map(|_| {
                let before = rate.factor;
                rate.observe(1.0);
                rate.factor < before
            })
            .collect();
        // The first of the twelve is the one that set the best.
        assert_eq!(drops.iter().position(|d| *d), Some(10));
        assert_eq!(drops.iter().filter(|d| **d).count(), 2);
    }

    #[test]
    fn plateau_stops_at_its_floor_and_forgives_improvement() {
        let schedule = Schedule::Plateau { factor: 0.1, patience: 1, min_lr: 1e-4, warmup: 0.0 };
        let mut rate = Rate::new(&schedule, 1000, 1e-2);
        // Two flat evaluations lower the rate; an improvement between them starts the count again.
        for (loss, factor) in [(1.0, 1.0), (1.0, 1.0), (0.9, 1.0), (0.9, 1.0), (0.9, 0.1), (0.9, 0.1), (0.9, 0.01)] {
            rate.observe(loss);
            assert!((rate.at(500) - factor).abs() < 1e-12);
        }
        (0..10).for_each(|_| rate.observe(0.9));
        assert!((rate.at(500) * 1e-2 - 1e-4).abs() < 1e-12);
    }

    #[test]
    fn straight_lines_are_straight() {
        let linear = Rate::new(&Schedule::Linear { warmup: 0.2, floor: 0.5 }, 10, 1.0);
        let wsd = Rate::new(&Schedule::Wsd { warmup: 0.2, decay: 0.4, floor: 0.1 }, 10, 1.0);
        let close = |rate: &Rate, wanted: [f64; 11]| {
            for (step, wanted) in wanted.into_iter().enumerate() {
                let found = rate.at(step as u64);
                assert!((found - wanted).abs() < 1e-12, "step {step}: {found}, not {wanted}");
            }
        };
        close(&linear, [0.5, 1.0, 1.0, 0.9375, 0.875, 0.8125, 0.75, 0.6875, 0.625, 0.5625, 0.5]);
        close(&wsd, [0.5, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 0.775, 0.55, 0.325, 0.1]);
        let constant = Rate::new(&Schedule::Constant { warmup: 0.5 }, 4, 1.0);
        assert_eq!([0, 1, 2, 3].map(|step| constant.at(step)), [0.5, 1.0, 1.0, 1.0]);
    }

    #[test]
    fn cosine_rises_and_falls() {
        let rate = Rate::new(&Schedule::Cosine { warmup: 0.1, floor: 0.1 }, 100, 1.0);
        assert!((rate.at(0) - 0.1).abs() < 1e-12);
        assert!((rate.at(10) - 1.0).abs() < 1e-12);
        assert!(rate.at(99) < 0.11 && rate.at(99) >= 0.1);
    }
}
