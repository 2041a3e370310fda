//! The recall suite: can the model find again what it read? Generated for any tokenizer, scored by exact match.
//!
//! | task | prompt | grid |
//! |---|---|---|
//! | associative | pairs of key and value, other text, then keys whose values are wanted (MQAR, arXiv 2312.04927) | pairs × distance |
//! | passkey | a value told once in a long text and asked for at the end (arXiv 2305.16300) | depth × length |
//! | copy | a line of random tokens that is to be written again | length × distance |
//! | induction | a span that occurs twice in random tokens: what followed it? (arXiv 2209.11895) | depth × length |
//!
//! An answer is right when greedy decoding writes all of it. One pass over prompt and answer tells: see
//! [`Score::greedy`](super::score::Score::greedy). A small model may never have seen such prompts, random words least of
//! all: what its teacher cannot do, it has not lost. Prompts of your own test what a model was trained on
//! ([`recall`](fn@super::recall)).

use serde::{Deserialize, Serialize};

use super::Subject;
use super::prompts::Prompts;
use super::score::{Asked, score};
use crate::convert::plan::Section;
use crate::data::Tokenizer;
use crate::error::{Error, Kind, Result};
use crate::plot::{Figure, Heat, Scale};
use crate::progress::Progress;

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Task {
    Associative,
    Passkey,
    Copy,
    Induction,
}

impl Task {
    pub const ALL: [Task; 4] = [Task::Associative, Task::Passkey, Task::Copy, Task::Induction];

    pub fn title(self) -> &'static str {
        match self {
            Task::Associative => "Associative recall",
            Task::Passkey => "Passkey",
            Task::Copy => "Copying",
            Task::Induction => "Induction",
        }
    }

    /// Names of rows and columns with their unit.
    fn axes(self) -> (&'static str, &'static str) {
        match self {
            Task::Associative => ("pairs", "distance in tokens"),
            Task::Passkey | Task::Induction => ("depth in %", "length in tokens"),
            Task::Copy => ("tokens to copy", "distance in tokens"),
        }
    }

    /// All values of rows and columns; those that do not fit the length are left out.
    fn grid(self) -> (&'static [usize], &'static [usize]) {
        const DEPTHS: &[usize] = &[0, 25, 50, 75, 100];
        const LENGTHS: &[usize] = &[64, 128, 256, 512, 1024, 2048, 4096, 8192, 16_384, 32_768, 65_536, 131_072];
        const DISTANCES: &[usize] = &[0, 64, 256, 1024, 4096, 16_384, 65_536];
        match self {
            Task::Associative => (&[4, 8, 16, 32, 64, 128, 256], DISTANCES),
            Task::Passkey | Task::Induction => (DEPTHS, LENGTHS),
            Task::Copy => (&[8, 16, 32, 64, 128, 256], DISTANCES),
        }
    }
}

/// What the suite is made of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Settings {
    pub seed: u64,
    /// Prompts of each cell, at most 4096.
    pub samples: u64,
    /// Tokens of the longest prompt with its answers.
    pub longest: usize,
}

/// All grids.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Suite {
    pub seed: u64,
    pub grids: Vec<Grid>,
}

/// One task over its two sizes.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Grid {
    pub task: Task,
    pub rows: Vec<usize>,
    pub columns: Vec<usize>,
    /// Rows of columns; `None` where the prompt would be too long.
    pub cells: Vec<Vec<Option<Cell>>>,
}

/// Answers of one cell.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Cell {
    pub asked: usize,
    pub right: usize,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub teacher_right: Option<usize>,
}

impl Cell {
    fn share(right: usize, asked: usize) -> f64 {
        right as f64 / asked.max(1) as f64
    }

    /// Share of right answers.
    pub fn accuracy(&self) -> f64 {
        Self::share(self.right, self.asked)
    }

    /// The same of the teacher, where it was asked.
    pub fn teacher_accuracy(&self) -> Option<f64> {
        self.teacher_right.map(|right| Self::share(right, self.asked))
    }
}

/// Asks `model`, and the teacher where there is one, every prompt of the suite.
///
/// Fails where not one cell fits `longest`, or the tokenizer has too few ordinary tokens.
pub fn suite(
    model: Subject,
    teacher: Option<Subject>,
    tokenizer: &Tokenizer,
    settings: Settings,
    progress: &dyn Progress,
) -> Result<Suite> {
    let prompts = Prompts::new(tokenizer, settings.seed)?;
    let mut grids =
        Task::ALL.into_iter().map(|task| Layout::of(task, &prompts, settings)).collect::<Result<Vec<_>>>()?;
    grids.retain(|grid| !grid.rows.is_empty());
    if grids.is_empty() {
        let message = format!("no prompt of the recall suite fits {} tokens", settings.longest);
        return Err(Error::new(Kind::Data, message).hint("raise `--seq-len`"));
    }
    let count: usize = grids.iter().map(|g| g.cells.iter().flatten().flatten().map(Vec::len).sum::<usize>()).sum();
    let models = 1 + teacher.is_some() as u64;
    progress.begin("recall", models * count as u64, 0, "prompts");
    let grids = grids.into_iter().map(|grid| grid.ask(model, teacher, progress)).collect::<Result<_>>()?;
    progress.end("");
    Ok(Suite { seed: settings.seed, grids })
}

/// A grid with its prompts.
struct Layout {
    task: Task,
    rows: Vec<usize>,
    columns: Vec<usize>,
    /// [rows][columns]
    cells: Vec<Vec<Option<Vec<Asked>>>>,
}

impl Layout {
    /// The part of the task's grid in which prompts fit.
    fn of(task: Task, prompts: &Prompts, settings: Settings) -> Result<Layout> {
        let cell = |row: usize, column: usize| -> Result<Option<Vec<Asked>>> {
            let one = |number: u64| prompts.make(task, row, column, number, settings.longest);
            (0..settings.samples).map(one).collect()
        };
        let (rows, columns) = task.grid();
        let cells = rows.iter().map(|r| columns.iter().map(|c| cell(*r, *c)).collect::<Result<Vec<_>>>());
        let cells: Vec<_> = cells.collect::<Result<_>>()?;
        let any = |column: usize| cells.iter().any(|row| row[column].is_some());
        let kept: Vec<usize> = (0..columns.len()).filter(|c| any(*c)).collect();
        let filled = rows.iter().zip(cells).filter(|(_, row)| row.iter().any(Option::is_some));
        let (rows, cells) = filled.map(|(r, mut row)| (*r, kept.iter().map(|c| row[*c].take()).collect())).unzip();
        Ok(Layout { task, rows, columns: kept.iter().map(|c| columns[*c]).collect(), cells })
    }

    fn ask(self, model: Subject, teacher: Option<Subject>, progress: &dyn Progress) -> Result<Grid> {
        let right = |model: Subject, prompts: &[Asked]| -> Result<usize> {
            Ok(score(model, prompts, progress)?.iter().flatten().filter(|s| s.greedy).count())
        };
        let cell = |prompts: Option<Vec<Asked>>| -> Result<Option<Cell>> {
            let Some(prompts) = prompts else { return Ok(None) };
            Ok(Some(Cell {
                asked: prompts.iter().map(|p| p.spans.len()).sum(),
                right: right(model, &prompts)?,
                teacher_right: teacher.map(|t| right(t, &prompts)).transpose()?,
            }))
        };
        let rows = self.cells.into_iter().map(|row| row.into_iter().map(cell).collect::<Result<Vec<_>>>());
        let cells = rows.collect::<Result<_>>()?;
        Ok(Grid { task: self.task, rows: self.rows, columns: self.columns, cells })
    }
}

impl Grid {
    /// The grid as a table of percentages, with those of the teacher behind a stroke where it was asked.
    pub fn section(&self) -> Section {
        let (rows, columns) = self.task.axes();
        let percent = |share: f64| format!("{:.0}", 100.0 * share);
        let text = |cell: &Option<Cell>| match cell {
            None => "–".to_string(),
            Some(c) => match c.teacher_accuracy() {
                Some(teacher) => format!("{}/{}", percent(c.accuracy()), percent(teacher)),
                None => percent(c.accuracy()),
            },
        };
        let mut table = vec![[vec![format!("{rows} \\ {columns}")], names(&self.columns)].concat()];
        let row = |(name, cells): (&usize, &Vec<Option<Cell>>)| {
            [vec![name.to_string()], cells.iter().map(text).collect()].concat()
        };
        table.extend(self.rows.iter().zip(&self.cells).map(row));
        for column in 0..table[0].len() {
            let width = table.iter().map(|row| row[column].chars().count()).max().unwrap_or(0);
            table.iter_mut().for_each(|row| row[column] = format!("{:>width$}", row[column]));
        }
        Section { title: self.task.title(), columns: Vec::new(), rows: table }
    }

    /// The grid as a heat map, and the teacher's beside it where it was asked.
    pub fn figures(&self) -> Vec<Figure> {
        let (row_label, column_label) = self.task.axes();
        let map = |who: &str, of: &dyn Fn(&Cell) -> Option<f64>| {
            let cells: Vec<Vec<Option<f64>>> =
                self.cells.iter().map(|row| row.iter().map(|c| c.as_ref().and_then(of)).collect()).collect();
            let any = cells.iter().flatten().any(Option::is_some);
            any.then(|| {
                Heat {
                    title: &format!("{}{who}", self.task.title()),
                    row_label,
                    column_label,
                    rows: names(&self.rows),
                    columns: names(&self.columns),
                    cells,
                    scale: Scale::Linear,
                    range: Some((0.0, 1.0)),
                    text: &|share| format!("{:.0} %", 100.0 * share),
                }
                .figure()
            })
        };
        let both = [map("", &|c| Some(c.accuracy())), map(", teacher", &Cell::teacher_accuracy)];
        both.into_iter().flatten().collect()
    }
}

fn names(values: &[usize]) -> Vec<String> {
    values.iter().map(usize::to_string).collect()
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    fn tokenizer() -> Tokenizer {
        Tokenizer::open(&Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/llama-tiny")).unwrap()
    }

    fn layouts(seed: u64, longest: usize) -> Vec<Layout> {
        let tokenizer = tokenizer();
        let prompts = Prompts::new(&tokenizer, seed).unwrap();
        let settings = Settings { seed, samples: 2, longest };
        Task::ALL.into_iter().map(|task| Layout::of(task, &prompts, settings).unwrap()).collect()
    }

    #[test]
    fn a_seed_makes_the_same_prompts() {
        let all = |seed, longest| layouts(seed, longest).into_iter().map(|l| l.cells).collect::<Vec<_>>();
        assert!(all(3, 512) == all(3, 512));
        assert!(all(3, 512) != all(4, 512));
        // A cell does not depend on which others fit.
        let (long, short) = (layouts(3, 1024), layouts(3, 256));
        for (long, short) in long.iter().zip(&short) {
            assert!(short.columns.len() < long.columns.len());
            assert!(long.cells[0][0].is_some() && long.cells[0][0] == short.cells[0][0], "{:?}", long.task);
        }
    }

    #[test]
    fn prompts_hold_what_they_ask_for() {
        let tokenizer = tokenizer();
        let words: Vec<u32> = tokenizer.words().unwrap().into_iter().map(|(id, _)| id).collect();
        for layout in layouts(0, 512) {
            for prompt in layout.cells.iter().flatten().flatten().flatten() {
                assert!(prompt.ids.len() <= 512 && !prompt.spans.is_empty());
                for span in &prompt.spans {
                    let answer = &prompt.ids[span.clone()];
                    let before = &prompt.ids[..span.start];
                    assert!(before.windows(answer.len()).any(|w| w == answer), "{:?}", layout.task);
                }
                assert!(!prompt.ids.iter().any(|id| tokenizer.stops().contains(id)));
                if layout.task == Task::Induction {
                    assert!(prompt.ids.iter().all(|id| words.contains(id) || tokenizer.lead().contains(id)));
                }
            }
        }
    }

    #[test]
    fn tables_ask_for_what_they_told() {
        let [associative, passkey, ..] = &layouts(1, 512)[..] else { unreachable!() };
        assert_eq!((associative.rows[1], associative.columns[1]), (8, 64));
        let tokenizer = tokenizer();
        for prompt in associative.cells[1][1].as_ref().unwrap() {
            let text = tokenizer.decode(&prompt.ids).unwrap();
            let (told, asked) = text.strip_prefix("Names:\n").unwrap().split_once("Ask:\n").unwrap();
            assert_eq!((told.matches("->").count(), asked.lines().count(), prompt.spans.len()), (8, 8, 8));
            for (line, span) in asked.lines().zip(&prompt.spans) {
                assert!(told.contains(&format!("{line}\n")), "{text}");
                let answer = tokenizer.decode(&prompt.ids[span.clone()]).unwrap();
                assert_eq!(answer, format!("{}\n", line.split_once("->").unwrap().1));
            }
        }
        for (column, length) in passkey.columns.iter().enumerate() {
            for prompt in passkey.cells.iter().flat_map(|row| row[column].as_ref().unwrap()) {
                assert!((length - 24..=*length).contains(&prompt.ids.len()), "{} for {length}", prompt.ids.len());
                let text = tokenizer.decode(&prompt.ids).unwrap();
                assert_eq!(text.matches("passkey ->").count(), 2);
            }
        }
    }

    #[test]
    fn a_grid_as_a_table() {
        let cell = |right| Some(Cell { asked: 8, right, teacher_right: Some(8) });
        let (rows, columns) = (vec![4, 16], vec![0, 64]);
        let grid =
            Grid { task: Task::Associative, rows, columns, cells: vec![vec![cell(8), cell(4)], vec![cell(1), None]] };
        let table = grid.section();
        assert_eq!(table.rows[1][0].trim_start(), "4");
        assert_eq!(table.rows[1][1..], ["100/100", "50/100"]);
        assert_eq!(table.rows[2][1..], [" 12/100", "     –"]);
        assert_eq!(grid.figures().len(), 2);
    }
}
