//! Multiple choice by log-likelihood, as the LM Evaluation Harness does it.
//!
//! Each choice is scored as the continuation of the context: its log-likelihood is that of the tokens which context and
//! choice together have more than the context alone, and spaces at the end of the context belong to the choice. The
//! largest wins (`accuracy`), or the largest per character of the choice (`accuracy_norm`). A text that is too long
//! loses its beginning.

use serde::{Deserialize, Serialize};

use super::Subject;
use super::score::{Asked, Score, score};
use crate::convert::plan::{Section, heads};
use crate::data::{ChoiceItem, Tokenizer};
use crate::error::{Error, Kind, Result};
use crate::progress::Progress;

/// Answers to a set of questions.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Choices {
    pub questions: usize,
    pub shots: usize,
    /// How often each place in the list of choices is the right one.
    pub gold: Vec<usize>,
    pub model: Answers,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub teacher: Option<Answers>,
}

/// What one model answered.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Answers {
    /// Share of right answers, and its standard error.
    pub accuracy: f64,
    pub accuracy_stderr: f64,
    /// The same where log-likelihoods are divided by the characters of the choice.
    pub accuracy_norm: f64,
    pub accuracy_norm_stderr: f64,
    /// How often each place in the list of choices was taken.
    pub chosen: Vec<usize>,
}

/// Asks `model`, and the teacher where there is one. `shots` are answered questions put before each; `longest` bounds
/// the tokens that are read of a text.
pub fn choices(
    model: Subject,
    teacher: Option<Subject>,
    tokenizer: &Tokenizer,
    items: &[ChoiceItem],
    shots: &[ChoiceItem],
    longest: usize,
    progress: &dyn Progress,
) -> Result<Choices> {
    let before: String = shots.iter().map(|s| format!("{}\n\n", joined(&s.context, &s.choices[s.gold]))).collect();
    let mut asked = Vec::new();
    for item in items {
        let context = format!("{before}{}", item.context);
        for choice in &item.choices {
            asked.push(continuation(tokenizer, &context, choice, longest)?);
        }
    }
    progress.begin("choices", asked.len() as u64 * (1 + teacher.is_some() as u64), 0, "texts");
    let answers = |model: Subject| -> Result<Answers> { Ok(judge(items, &score(model, &asked, progress)?)) };
    let (model, teacher) = (answers(model)?, teacher.map(answers).transpose()?);
    progress.end("");
    let gold = places(items, items.iter().map(|item| item.gold));
    Ok(Choices { questions: items.len(), shots: shots.len(), gold, model, teacher })
}

/// Context and choice, a space between them unless one of them brings it.
fn joined(context: &str, choice: &str) -> String {
    let spaced =
        context.is_empty() || context.ends_with(char::is_whitespace) || choice.starts_with(char::is_whitespace);
    format!("{context}{}{choice}", if spaced { "" } else { " " })
}

fn continuation(tokenizer: &Tokenizer, context: &str, choice: &str, longest: usize) -> Result<Asked> {
    let whole = tokenizer.encode_prompt(&joined(context, choice))?;
    let start = tokenizer.encode_prompt(context.trim_end())?.len();
    if start == 0 || whole.len() < 2 {
        return Err(Error::new(
            Kind::Data,
            "a question has an empty context, and the tokenizer no BOS to stand for it",
        )
        .hint("give every row a `context`"));
    }
    // A choice whose first token begins in the context is scored by its last token at least.
    let start = start.min(whole.len() - 1);
    let cut = whole.len().saturating_sub(longest + 1).min(start - 1);
    Ok(Asked::end(whole[cut..].to_vec(), start - cut))
}

/// `scores` has one entry for every choice of every item, in order.
fn judge(items: &[ChoiceItem], scores: &[Vec<Score>]) -> Answers {
    let mut rest = scores.iter().map(|spans| spans.iter().map(|s| s.log_likelihood).sum::<f64>());
    let (mut plain, mut norm) = (Vec::new(), Vec::new());
    for item in items {
        let likelihoods: Vec<f64> = rest.by_ref().take(item.choices.len()).collect();
        let lengths = item.choices.iter().map(|c| c.chars().count().max(1) as f64);
        norm.push(best(likelihoods.iter().zip(lengths).map(|(l, n)| l / n)));
        plain.push(best(likelihoods.into_iter()));
    }
    let right = |chosen: &[usize]| {
        let right = items.iter().zip(chosen).filter(|(item, chosen)| item.gold == **chosen).count();
        let (share, n) = (right as f64 / items.len() as f64, items.len() as f64);
        (share, (share * (1.0 - share) / (n - 1.0).max(1.0)).sqrt())
    };
    let ((accuracy, accuracy_stderr), (accuracy_norm, accuracy_norm_stderr)) = (right(&plain), right(&norm));
    let chosen = places(items, plain.into_iter());
    Answers { accuracy, accuracy_stderr, accuracy_norm, accuracy_norm_stderr, chosen }
}

/// Index of the largest, the first of equals.
fn best(values: impl Iterator<Item = f64>) -> usize {
    let larger = |best: (usize, f64), (i, value)| if value > best.1 { (i, value) } else { best };
    values.enumerate().fold((0, f64::NEG_INFINITY), larger).0
}

/// How often each place occurs.
fn places(items: &[ChoiceItem], taken: impl Iterator<Item = usize>) -> Vec<usize> {
    let mut counts = vec![0; items.iter().map(|item| item.choices.len()).max().unwrap_or(0)];
    taken.for_each(|place| counts[place] += 1);
    counts
}

impl Choices {
    /// The one place that `answers` took in more than four of five questions though it is right in less than half:
    /// linearized models can lose multiple choice to one letter while other measures look recovered (arXiv 2608.02689).
    pub fn collapsed(&self, answers: &Answers) -> Option<usize> {
        let n = self.questions;
        let stuck = |place: &usize| 5 * answers.chosen[*place] > 4 * n && 2 * self.gold[*place] < n;
        (n >= 10).then(|| (0..answers.chosen.len()).find(stuck)).flatten()
    }

    /// What to warn of, in words.
    pub fn warning(&self) -> Option<String> {
        let place = self.collapsed(&self.model)?;
        let (taken, right) = (self.model.chosen[place], self.gold[place]);
        Some(format!(
            "the answers collapsed to choice {}: taken in {taken} of {} questions, right in {right}",
            letter(place),
            self.questions
        ))
    }

    pub fn sections(&self) -> Vec<Section> {
        let with_error = |share: f64, error: f64| format!("{:.1} % ± {:.1}", 100.0 * share, 100.0 * error);
        let row = |name: &str, a: &Answers| {
            let plain = with_error(a.accuracy, a.accuracy_stderr);
            vec![
                name.into(),
                self.questions.to_string(),
                self.shots.to_string(),
                plain,
                with_error(a.accuracy_norm, a.accuracy_norm_stderr),
            ]
        };
        let mut rows = vec![row("model", &self.model)];
        rows.extend(self.teacher.as_ref().map(|t| row("teacher", t)));
        let columns = heads(["", "questions", "shots", "accuracy", "per character"]);
        let table = Section { title: "Multiple choice", columns, rows };

        let percent = |n: usize| format!("{:.1} %", 100.0 * n as f64 / self.questions.max(1) as f64);
        let row = |place: usize| {
            let mut row = vec![letter(place), percent(self.gold[place]), percent(self.model.chosen[place])];
            row.extend(self.teacher.as_ref().map(|t| percent(t.chosen[place])));
            row
        };
        let mut columns = heads(["choice", "right", "taken"]);
        columns.extend(self.teacher.as_ref().map(|_| "by the teacher".into()));
        let rows = (0..self.gold.len()).map(row).collect();
        vec![table, Section { title: "Answers", columns, rows }]
    }
}

/// A, B, …, Z, then numbers.
fn letter(place: usize) -> String {
    match u8::try_from(place) {
        Ok(n @ 0..26) => char::from(b'A' + n).into(),
        _ => (place + 1).to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn item(choices: &[&str], gold: usize) -> ChoiceItem {
        ChoiceItem { context: "x".into(), choices: choices.iter().map(|c| c.to_string()).collect(), gold }
    }

    fn scored(log_likelihoods: &[f64]) -> Vec<Vec<Score>> {
        log_likelihoods.iter().map(|l| vec![Score { log_likelihood: *l, greedy: false }]).collect()
    }

    #[test]
    fn accuracy_by_hand() {
        // Plain takes 1, 0, 0; per character -2/4 beats -1/1, -3/2 loses to -4/4, -1 beats -9.
        let items = [item(&["four", "a"], 0), item(&["of", "four"], 1), item(&["a", "b", "c"], 2)];
        let found = judge(&items, &scored(&[-2.0, -1.0, -3.0, -4.0, -1.0, -9.0, -2.0]));
        assert_eq!((found.accuracy, found.accuracy_norm), (0.0, 2.0 / 3.0));
        assert_eq!(found.chosen, [2, 1, 0]);
        assert!((found.accuracy_norm_stderr - (2.0f64 / 9.0 / 2.0).sqrt()).abs() < 1e-12);
    }

    #[test]
    fn a_collapse_is_called_out() {
        let items: Vec<_> = (0..20).map(|i| item(&["a", "b", "c", "d"], i % 4)).collect();
        let answered = |chosen: Vec<usize>| {
            let model = Answers { chosen, ..judge(&items, &scored(&[0.0; 80])) };
            Choices {
                questions: 20,
                shots: 0,
                gold: places(&items, items.iter().map(|i| i.gold)),
                model,
                teacher: None,
            }
        };
        assert_eq!(
            answered(vec![0, 0, 20, 0]).warning().unwrap(),
            "the answers collapsed to choice C: taken in 20 of 20 questions, right in 5"
        );
        assert_eq!(answered(vec![16, 2, 1, 1]).warning(), None);
    }

    #[test]
    fn one_space_joins() {
        assert_eq!(joined("Answer:", "yes"), "Answer: yes");
        assert_eq!(joined("Answer: ", "yes"), "Answer: yes");
        assert_eq!(joined("Answer:", " yes"), "Answer: yes");
    }
}
