//! The training log as a TensorBoard event file.
//!
//! A file is a row of TFRecords, each one `Event` message of protobuf:
//!
//! ```text
//! record   length u64, masked crc32c of the length, bytes of the event, masked crc32c of those; little-endian
//! Event    1: wall_time double   2: step int64   3: file_version string   5: Summary
//! Summary  1: repeated Value { 1: tag string   2: simple_value float }
//! ```
//!
//! Tags begin with the name of the stage. What a run writes after its last saved state it writes again when it is
//! continued; [`Board::cut`] takes the first copy out, as the log does.

use std::collections::BTreeMap;
use std::fs::{self, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use serde_json::Value;

use crate::checkpoint::writer::{output, write_atomic};
use crate::error::{Error, Result};

/// An event file that takes the lines of the training log.
#[derive(Debug)]
pub struct Board {
    path: PathBuf,
    /// Names of the parts of each stage's loss.
    parts: BTreeMap<String, Vec<String>>,
    /// Stage, tokens and time of the last training step.
    last: Option<(String, f64, Instant)>,
}

const PREFIX: &str = "events.out.tfevents.";
const SUFFIX: &str = ".margay";

impl Board {
    /// Continues the event file in `dir`, or begins one. `log` are the lines written so far. Give each run a folder.
    pub fn open(dir: &Path, log: &str) -> Result<Board> {
        fs::create_dir_all(dir).map_err(|e| output("create", dir, e))?;
        let entries = fs::read_dir(dir).map_err(|e| output("look into", dir, e))?;
        let names = entries.flatten().map(|entry| entry.file_name().to_string_lossy().into_owned());
        let found = names.filter(|name| name.starts_with(PREFIX) && name.ends_with(SUFFIX)).max();
        let path = dir.join(found.clone().unwrap_or_else(|| format!("{PREFIX}{:.0}{SUFFIX}", now())));
        let mut board = Board { path, parts: BTreeMap::new(), last: None };
        log.lines().filter_map(|line| serde_json::from_str(line).ok()).for_each(|line| board.name_parts(&line));
        match found {
            Some(_) => board.retain(|_| true)?, // an event torn by a kill goes
            None => board.append(&message(|event| {
                double(event, 1, now());
                bytes(event, 3, b"brain.Event:2");
            }))?,
        }
        Ok(board)
    }

    /// Takes a line of the log: losses, their parts, learning rate, gradient norm, and tokens per second since the line
    /// before.
    pub fn add(&mut self, line: &Value) -> Result<()> {
        self.name_parts(line);
        let (Some(stage), Some(step)) = (line["stage"].as_str(), line["step"].as_u64()) else { return Ok(()) };
        let mut scalars: Vec<(String, f64)> = Vec::new();
        let mut scalar = |tag: String, value: Option<f64>| scalars.extend(value.map(|value| (tag, value)));
        let mean = |list: &Value| {
            let list: Vec<f64> = list.as_array()?.iter().filter_map(Value::as_f64).collect();
            (!list.is_empty()).then(|| list.iter().sum::<f64>() / list.len() as f64)
        };
        scalar(format!("{stage}/loss"), line["loss"].as_f64());
        scalar(format!("{stage}/validation loss"), mean(&line["valid"]));
        scalar(format!("{stage}/learning rate"), line["lr"].as_f64());
        scalar(format!("{stage}/gradient norm"), line["grad_norm"].as_f64());
        if let Some(tokens) = line["tokens"].as_f64() {
            let before = self.last.replace((stage.into(), tokens, Instant::now()));
            if let Some((_, was, at)) = before.filter(|(name, was, _)| name == stage && *was < tokens) {
                let rate = (tokens - was) / at.elapsed().as_secs_f64().max(1e-9);
                scalar(format!("{stage}/tokens per second"), Some(rate));
            }
        }
        let names = self.parts.get(stage).map_or(&[][..], Vec::as_slice);
        for (what, list) in [("loss", &line["losses"]), ("validation loss", &line["valid"])] {
            let list = list.as_array().filter(|list| list.len() > 1).into_iter().flatten();
            for (i, value) in list.enumerate() {
                let part = names.get(i).cloned().unwrap_or_else(|| format!("part {i}"));
                scalar(format!("{stage} {what}/{part}"), value.as_f64());
            }
        }
        if scalars.is_empty() {
            return Ok(());
        }
        self.append(&message(|event| {
            double(event, 1, now());
            varint(event, 2 << 3);
            varint(event, step);
            let summary = message(|summary| {
                for (tag, value) in &scalars {
                    let value = message(|v| {
                        bytes(v, 1, tag.as_bytes());
                        v.push(2 << 3 | 5);
                        v.extend((*value as f32).to_le_bytes());
                    });
                    bytes(summary, 1, &value);
                }
            });
            bytes(event, 5, &summary);
        }))
    }

    /// Takes out what a stage wrote after `step`, or all of it.
    pub fn cut(&mut self, stage: &str, step: Option<u64>) -> Result<()> {
        self.retain(|event| match place(event) {
            Some((at, tag)) if tag.split('/').next() == Some(stage) => step.is_some_and(|step| at <= step),
            _ => true,
        })
    }

    fn name_parts(&mut self, line: &Value) {
        let (Some(stage), Some(parts)) = (line["stage"].as_str(), line["parts"].as_array()) else { return };
        self.parts.insert(stage.into(), parts.iter().filter_map(Value::as_str).map(String::from).collect());
    }

    fn append(&self, event: &[u8]) -> Result<()> {
        let write = || OpenOptions::new().create(true).append(true).open(&self.path)?.write_all(&record(event));
        write().map_err(|e| output("write", &self.path, e))
    }

    /// Keeps the events that hold, byte for byte.
    fn retain(&self, keep: impl Fn(&[u8]) -> bool) -> Result<()> {
        let file = fs::read(&self.path).map_err(|e| Error::io("read", &self.path, e))?;
        let kept: Vec<u8> = events(&file).filter(|event| keep(event)).flat_map(record).collect();
        if kept == file { Ok(()) } else { write_atomic(&self.path, &kept) }
    }
}

/// Seconds since 1970.
fn now() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs_f64()
}

/// The events of a file up to the first record that is not whole.
fn events(file: &[u8]) -> impl Iterator<Item = &[u8]> {
    let mut rest = file;
    std::iter::from_fn(move || {
        let (head, data) = rest.split_at_checked(12)?;
        let length = u64::from_le_bytes(head[..8].try_into().ok()?) as usize;
        let (event, later) = data.split_at_checked(length)?;
        let (check, later) = later.split_at_checked(4)?;
        rest = later;
        (head[8..] == masked_crc(&head[..8]) && check == masked_crc(event)).then_some(event)
    })
}

fn record(event: &[u8]) -> Vec<u8> {
    let length = (event.len() as u64).to_le_bytes();
    [&length[..], &masked_crc(&length), event, &masked_crc(event)].concat()
}

/// Step and first tag of an event as [`Board::add`] writes it.
fn place(event: &[u8]) -> Option<(u64, &str)> {
    let (step, rest) = read_varint(event.get(9..)?.strip_prefix(&[2 << 3])?)?;
    let mut inner = rest;
    for field in [5, 1, 1] {
        let (length, data) = read_varint(inner.strip_prefix(&[field << 3 | 2])?)?;
        inner = data.get(..length as usize)?;
    }
    Some((step, std::str::from_utf8(inner).ok()?))
}

fn message(fill: impl FnOnce(&mut Vec<u8>)) -> Vec<u8> {
    let mut message = Vec::new();
    fill(&mut message);
    message
}

fn double(message: &mut Vec<u8>, field: u8, value: f64) {
    message.push(field << 3 | 1);
    message.extend(value.to_le_bytes());
}

fn bytes(message: &mut Vec<u8>, field: u8, value: &[u8]) {
    message.push(field << 3 | 2);
    varint(message, value.len() as u64);
    message.extend(value);
}

fn varint(message: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        message.push(value as u8 | 0x80);
        value >>= 7;
    }
    message.push(value as u8);
}

fn read_varint(data: &[u8]) -> Option<(u64, &[u8])> {
    let length = 1 + data.iter().take(10).position(|b| b & 0x80 == 0)?;
    let value = data[..length].iter().rev().fold(0, |value, b| value << 7 | (b & 0x7f) as u64);
    Some((value, &data[length..]))
}

/// CRC-32 with Castagnoli's polynomial, rotated and shifted as TFRecord wants it.
fn masked_crc(data: &[u8]) -> [u8; 4] {
    let step = |crc: u32, _| if crc & 1 == 1 { crc >> 1 ^ 0x82f6_3b78 } else { crc >> 1 };
    let crc = !data.iter().fold(!0u32, |crc, byte| (0..8).fold(crc ^ *byte as u32, step));
    crc.rotate_right(15).wrapping_add(0xa282_ead8).to_le_bytes()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    /// Step, tag and value of every scalar, read by the format's own rules and nothing of the code above but records.
    fn scalars(dir: &Path) -> Vec<(u64, String, f32)> {
        let files: Vec<_> = fs::read_dir(dir).unwrap().map(|e| e.unwrap().path()).collect();
        assert_eq!(files.len(), 1, "{files:?}");
        let file = fs::read(&files[0]).unwrap();
        let mut found = Vec::new();
        for event in events(&file) {
            let (mut step, mut summary) = (0, Vec::new());
            for (field, value) in fields(event) {
                match (field, value) {
                    (2, Field::Number(n)) => step = n,
                    (5, Field::Bytes(b)) => summary = b,
                    _ => {}
                }
            }
            for (_, value) in fields(&summary) {
                let Field::Bytes(value) = value else { panic!("a value is a message") };
                let [(1, Field::Bytes(tag)), (2, Field::Number(bits))] = &fields(&value)[..] else {
                    panic!("{value:?}")
                };
                found.push((step, String::from_utf8(tag.clone()).unwrap(), f32::from_bits(*bits as u32)));
            }
        }
        found
    }

    #[derive(Debug)]
    enum Field {
        Number(u64),
        Bytes(Vec<u8>),
    }

    fn fields(mut data: &[u8]) -> Vec<(u64, Field)> {
        let mut all = Vec::new();
        let take = |data: &mut &[u8], n: usize| -> Vec<u8> {
            let (front, rest) = data.split_at(n);
            *data = rest;
            front.to_vec()
        };
        let number = |data: &mut &[u8]| {
            let mut value = 0;
            for shift in (0..).step_by(7) {
                let byte = take(data, 1)[0];
                value |= ((byte & 127) as u64) << shift;
                if byte < 128 {
                    return value;
                }
            }
            unreachable!()
        };
        while !data.is_empty() {
            let key = number(&mut data);
            let value = match key & 7 {
                0 => Field::Number(number(&mut data)),
                1 => Field::Number(u64::from_le_bytes(take(&mut data, 8).try_into().unwrap())),
                2 => {
                    let length = number(&mut data) as usize;
                    Field::Bytes(take(&mut data, length))
                }
                5 => Field::Number(u32::from_le_bytes(take(&mut data, 4).try_into().unwrap()) as u64),
                other => panic!("wire type {other}"),
            };
            all.push((key >> 3, value));
        }
        all
    }

    #[test]
    fn the_checksum_is_castagnolis() {
        // The check value of the polynomial: crc32c("123456789") = 0xe3069283.
        let crc = u32::from_le_bytes(masked_crc(b"123456789")).wrapping_sub(0xa282_ead8).rotate_left(15);
        assert_eq!(crc, 0xe306_9283);
    }

    #[test]
    fn a_continued_file_has_every_step_once() {
        let dir = tempfile::tempdir().unwrap();
        let first = json!({"stage": "transfer", "step": 0, "valid": [3.0, 1.0], "parts": ["layer 2", "layer 300"]});
        let step = |step: u64| json!({"stage": "transfer", "step": step, "loss": 1.5, "losses": [1.0, 2.0], "lr": 0.01, "tokens": 512 * step});
        let mut board = Board::open(dir.path(), "").unwrap();
        board.add(&first).unwrap();
        (1..=300).for_each(|i| board.add(&step(i)).unwrap());
        let torn = [fs::read(&board.path).unwrap().as_slice(), &record(b"torn")[..15]].concat();
        fs::write(&board.path, torn).unwrap();
        drop(board);

        let mut board = Board::open(dir.path(), &format!("{first}\n")).unwrap();
        board.cut("transfer", Some(299)).unwrap();
        board.cut("recover", None).unwrap();
        (300..=301).for_each(|i| board.add(&step(i)).unwrap());
        board.add(&json!({"stage": "recover", "step": 1, "loss": 0.5})).unwrap();
        let found = scalars(dir.path());
        let steps = |tag: &str| found.iter().filter(|s| s.1 == tag).map(|s| s.0).collect::<Vec<_>>();
        assert_eq!(steps("transfer/loss"), (1..=301).collect::<Vec<_>>());
        assert_eq!(steps("transfer loss/layer 300"), (1..=301).collect::<Vec<_>>());
        assert!(found.contains(&(0, "transfer/validation loss".into(), 2.0)));
        assert!(found.contains(&(0, "transfer validation loss/layer 2".into(), 3.0)));
        assert!(found.contains(&(300, "transfer/learning rate".into(), 0.01)));
        assert!(found.iter().any(|s| s.1 == "transfer/tokens per second" && s.2 > 0.0));

        board.cut("transfer", None).unwrap();
        assert_eq!(scalars(dir.path()), [(1, "recover/loss".into(), 0.5)]);
    }
}
