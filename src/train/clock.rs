//! Where the time of a stage goes.
//!
//! Each lap gives the time since the one before to a span, so that the spans add up to the whole and none counts twice.
//! A GPU works behind the host, so there every lap has to wait for it, and the device idles while the host queues what
//! follows: a GPU is timed only where that is asked for. On the CPU laps cost nothing and are always taken.

use std::time::Instant;

use candle_core::{Device, Result};
use serde::{Deserialize, Serialize};

/// What a stage spends time on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Span {
    /// Choosing sequences and bringing them to the device.
    Data,
    /// The teacher's forward pass.
    Teacher,
    /// Forward and backward pass of the student of this number.
    Student(usize),
    /// The update of what the student of this number trains.
    Optimizer(usize),
    /// Validation.
    Evaluation,
    /// Log and progress on disk.
    Saving,
}

/// Seconds by span.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Spent {
    pub data: f64,
    pub teacher: f64,
    /// Of each student.
    pub students: Vec<f64>,
    pub optimizers: Vec<f64>,
    pub evaluation: f64,
    pub saving: f64,
}

impl Spent {
    fn span(&mut self, span: Span) -> &mut f64 {
        fn nth(list: &mut Vec<f64>, n: usize) -> &mut f64 {
            list.resize(list.len().max(n + 1), 0.0);
            &mut list[n]
        }
        match span {
            Span::Data => &mut self.data,
            Span::Teacher => &mut self.teacher,
            Span::Student(n) => nth(&mut self.students, n),
            Span::Optimizer(n) => nth(&mut self.optimizers, n),
            Span::Evaluation => &mut self.evaluation,
            Span::Saving => &mut self.saving,
        }
    }

    /// Names and seconds of the spans that took time; students together.
    fn named(&self) -> Vec<(&'static str, f64)> {
        let (students, optimizers) = (self.students.iter().sum(), self.optimizers.iter().sum());
        let all = [
            ("teacher", self.teacher),
            ("student", students),
            ("optimizer", optimizers),
            ("data", self.data),
            ("evaluation", self.evaluation),
            ("saving", self.saving),
        ];
        all.into_iter().filter(|(_, seconds)| *seconds > 0.0).collect()
    }

    /// Seconds of all spans.
    pub fn total(&self) -> f64 {
        self.named().into_iter().map(|(_, seconds)| seconds).sum()
    }

    /// Seconds of what only one student needs.
    pub fn own(&self, student: usize) -> f64 {
        let of = |list: &[f64]| list.get(student).copied().unwrap_or_default();
        of(&self.students) + of(&self.optimizers)
    }

    /// Seconds of one student's training as if it were alone: its own and what no student can do without.
    pub fn alone(&self, student: usize) -> f64 {
        self.data + self.teacher + self.own(student)
    }

    /// `student 61 %, teacher 25 %, evaluation 14 %`: shares of a percent or more, the largest first.
    pub fn shares(&self) -> String {
        let total = self.total().max(1e-9);
        let mut named = self.named();
        named.sort_by(|a, b| b.1.total_cmp(&a.1));
        let shares = named.into_iter().map(|(name, seconds)| (name, 100.0 * seconds / total));
        let told = shares.filter(|(_, share)| *share >= 0.5).map(|(name, share)| format!("{name} {share:.0} %"));
        told.collect::<Vec<_>>().join(", ")
    }
}

/// A clock that is lapped.
pub struct Clock {
    pub spent: Spent,
    last: Instant,
    device: Device,
    runs: bool,
}

impl Clock {
    /// Goes on from `spent`, what earlier runs of the stage took. Work on a GPU is timed only where `timed`.
    pub fn new(spent: Spent, device: &Device, timed: bool) -> Clock {
        Clock { spent, last: Instant::now(), device: device.clone(), runs: timed || device.is_cpu() }
    }

    /// Gives the time since the last lap to `span`.
    pub fn lap(&mut self, span: Span) -> Result<()> {
        if self.runs {
            self.device.synchronize()?;
            let now = Instant::now();
            *self.spent.span(span) += (now - self.last).as_secs_f64();
            self.last = now;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn laps_add_up_and_go_on() {
        let started = Instant::now();
        let mut clock = Clock::new(Spent { teacher: 100.0, ..Spent::default() }, &Device::Cpu, false);
        for span in [Span::Teacher, Span::Student(2), Span::Student(0), Span::Optimizer(2)] {
            clock.lap(span).unwrap();
        }
        let spent = &clock.spent;
        assert!((100.0..=100.0 + started.elapsed().as_secs_f64()).contains(&spent.total()));
        assert_eq!((spent.students.len(), spent.students[1], spent.optimizers[..2].to_vec()), (3, 0.0, vec![0.0; 2]));
    }

    #[test]
    fn what_one_student_would_take_and_what_is_told() {
        let spent = Spent {
            teacher: 2.0,
            students: vec![1.0, 5.0],
            optimizers: vec![0.25, 1.75],
            evaluation: 10.0,
            ..Spent::default()
        };
        assert_eq!((spent.alone(0), spent.alone(1), spent.total()), (3.25, 8.75, 20.0));
        assert_eq!(spent.shares(), "evaluation 50 %, student 30 %, teacher 10 %, optimizer 10 %");
        assert_eq!(Spent::default().shares(), "");
    }
}
