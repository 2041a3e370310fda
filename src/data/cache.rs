//! The token stream of a set of files, tokenised once into a memory-mapped file.
//!
//! A cache file is named after what it was made from: the content of every file, the tokenizer and the settings that
//! shape the tokens. It is written beside and renamed in; a file that is torn, damaged or of another origin is made
//! again. Layout, little-endian: magic, key, sha256 of the tokens, four counts, then one `u32` a token.

use std::fs::{self, File};
use std::io::{BufWriter, ErrorKind, Read, Seek, SeekFrom, Write};
use std::ops::Range;
use std::path::{Path, PathBuf};

use memmap2::Mmap;
use sha2::{Digest, Sha256};
use tempfile::NamedTempFile;

use super::sources::{self, Content};
use super::tokenizer::{Joins, Tokenizer};
use super::{Chat, hex};
use crate::error::{Error, Kind, Result};
use crate::progress::{Progress, stop_requested};
use crate::recipe;

/// Changes whenever the same input would give other tokens or another layout.
const MAGIC: &[u8; 8] = b"margayT2";
const HEADER: usize = 128;
/// Longer texts are tokenised in pieces cut at line ends, so that memory stays small and all cores work.
const PIECE: usize = 256 << 10;
/// Bytes of text encoded at once.
const BATCH: usize = 1 << 20;

/// One token of the stream in 32 bits: the id, how many bytes of text it stands for, whether the loss leaves it out.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Token(u32);

impl Token {
    const ID_BITS: u32 = 23;
    const MAX_BYTES: usize = 255;

    fn new(id: u32, bytes: usize, masked: bool) -> Self {
        Token(id | (bytes as u32) << Self::ID_BITS | (masked as u32) << 31)
    }

    pub fn id(self) -> u32 {
        self.0 & ((1 << Self::ID_BITS) - 1)
    }

    pub fn bytes(self) -> usize {
        (self.0 >> Self::ID_BITS) as usize & Self::MAX_BYTES
    }

    pub fn masked(self) -> bool {
        self.0 >> 31 == 1
    }
}

/// What a token stream holds.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub(super) struct Counts {
    pub documents: u64,
    pub tokens: u64,
    /// Bytes of text behind the tokens.
    pub bytes: u64,
    /// Tokens left out of the loss.
    pub masked: u64,
}

/// A token stream on disk.
pub(super) struct Tokens {
    map: Mmap,
    pub counts: Counts,
    /// What it was made from, hexadecimal.
    pub key: String,
}

impl Tokens {
    /// The token stream of `files`, from the cache where it is there.
    pub fn open(
        files: &[PathBuf],
        settings: &recipe::Data,
        tokenizer: &Tokenizer,
        cache_dir: &Path,
        progress: &dyn Progress,
    ) -> Result<Self> {
        if tokenizer.largest_id() >> Token::ID_BITS != 0 {
            let message = format!("the tokenizer has ids up to {}, more than margay packs", tokenizer.largest_id());
            return Err(Error::new(Kind::Data, message));
        }
        let joins = Around {
            text: tokenizer.joins(settings)?,
            alpaca: tokenizer.alpaca_joins(settings)?,
            chat: tokenizer.chat_joins(settings)?,
        };
        let key = key(files, settings, tokenizer, &joins)?;
        fs::create_dir_all(cache_dir).map_err(|e| Error::io("create", cache_dir, e))?;
        let path = cache_dir.join(format!("{}.tokens", &hex(&key)[..32]));
        if let Some(tokens) = Self::map(&path, &key, progress)? {
            return Ok(tokens);
        }
        Writer::new(cache_dir, tokenizer, joins, settings.mask_prompt)?.run(files, settings, &path, &key, progress)?;
        Self::map(&path, &key, progress)?.ok_or_else(|| {
            Error::new(Kind::Io, format!("`{}` does not hold what was written to it", path.display()))
                .hint("check the disk and the free space")
        })
    }

    /// A whole and matching cache file, else `None`.
    fn map(path: &Path, key: &[u8; 32], progress: &dyn Progress) -> Result<Option<Self>> {
        let file = match File::open(path) {
            Ok(file) => file,
            Err(e) if e.kind() == ErrorKind::NotFound => return Ok(None),
            Err(e) => return Err(Error::io("read", path, e)),
        };
        // SAFETY: the file is only ever replaced by renaming another over it, never written in place.
        let map = unsafe { Mmap::map(&file) }.map_err(|e| Error::io("read", path, e))?;
        let whole = map.split_at_checked(HEADER).and_then(|(header, tokens)| {
            let counts = Counts::parse(&header[72..]);
            let same = header.starts_with(&head(key, &Sha256::digest(tokens).into(), &counts));
            (same && tokens.len() as u64 == 4 * counts.tokens).then_some(counts)
        });
        if whole.is_none() {
            progress.warn(&format!("`{}` is damaged; tokenising again", path.display()));
        }
        Ok(whole.map(|counts| Tokens { map, counts, key: hex(key) }))
    }

    /// The tokens at `range`, which must lie within the stream.
    pub fn slice(&self, range: Range<usize>) -> impl Iterator<Item = Token> + '_ {
        let bytes = &self.map[HEADER + 4 * range.start..HEADER + 4 * range.end];
        bytes.chunks_exact(4).map(|b| Token(u32::from_le_bytes([b[0], b[1], b[2], b[3]])))
    }
}

impl Counts {
    fn parse(bytes: &[u8]) -> Self {
        let mut words = bytes.chunks_exact(8).map(|b| b.iter().rev().fold(0, |word, byte| word << 8 | *byte as u64));
        let mut next = || words.next().unwrap_or(0);
        Counts { documents: next(), tokens: next(), bytes: next(), masked: next() }
    }
}

/// The first 104 bytes of a cache file.
fn head(key: &[u8; 32], tokens: &[u8; 32], counts: &Counts) -> Vec<u8> {
    let counts = [counts.documents, counts.tokens, counts.bytes, counts.masked].map(u64::to_le_bytes);
    [MAGIC.as_slice(), key, tokens, counts.as_flattened()].concat()
}

/// The tokens put around plain documents, Alpaca examples and conversations.
#[derive(Debug)]
struct Around {
    text: Joins,
    alpaca: Joins,
    chat: Joins,
}

fn key(files: &[PathBuf], settings: &recipe::Data, tokenizer: &Tokenizer, joins: &Around) -> Result<[u8; 32]> {
    let mut hash = Sha256::new();
    hash.update(MAGIC);
    let recipe::Data { field, format, mask_prompt, .. } = settings;
    hash.update(format!("{} {joins:?} {format:?} {mask_prompt} {field:?} ", tokenizer.digest()));
    hash.update(tokenizer.chat_template().map_or_else(String::new, |template| template.identity()));
    let mut buffer = vec![0; 1 << 20];
    for path in files {
        let mut file = sources::open(path)?;
        let mut content = Sha256::new();
        loop {
            match file.read(&mut buffer).map_err(|e| Error::io("read", path, e))? {
                0 => break,
                n => content.update(&buffer[..n]),
            }
        }
        // The ending decides the format.
        hash.update(path.extension().unwrap_or_default().as_encoded_bytes());
        hash.update(content.finalize());
    }
    Ok(hash.finalize().into())
}

/// A stretch of a document that is encoded by itself, with the tokens around it.
struct Part {
    text: String,
    bos: Option<u32>,
    eos: Option<u32>,
    /// The bytes whose tokens the loss counts, ascending.
    learned: Vec<Range<usize>>,
}

/// Tokenises documents into a cache file.
struct Writer<'a> {
    tokenizer: &'a Tokenizer,
    around: Around,
    mask_prompt: bool,
    dir: &'a Path,
    out: BufWriter<NamedTempFile>,
    hash: Sha256,
    counts: Counts,
    /// Parts that wait to be encoded, and the bytes of their text.
    parts: Vec<Part>,
    waiting: usize,
}

impl<'a> Writer<'a> {
    fn new(dir: &'a Path, tokenizer: &'a Tokenizer, around: Around, mask_prompt: bool) -> Result<Self> {
        let file = NamedTempFile::new_in(dir).map_err(|e| Error::io("write to", dir, e))?;
        let mut out = BufWriter::new(file);
        out.write_all(&[0; HEADER]).map_err(|e| Error::io("write to", dir, e))?;
        let (hash, counts) = Default::default();
        Ok(Writer { tokenizer, around, mask_prompt, dir, out, hash, counts, parts: Vec::new(), waiting: 0 })
    }

    fn run(
        mut self,
        files: &[PathBuf],
        settings: &recipe::Data,
        path: &Path,
        key: &[u8; 32],
        progress: &dyn Progress,
    ) -> Result<()> {
        let size = files.iter().filter_map(|f| fs::metadata(f).ok()).map(|m| m.len()).sum();
        progress.begin("tokenize", size, 0, "bytes");
        for document in sources::documents(files, settings) {
            let document = document?;
            self.counts.documents += 1;
            progress.advance(document.size, "");
            self.add(document)?;
        }
        self.flush()?;
        progress.end(&format!("{} tokens from {} documents", self.counts.tokens, self.counts.documents));
        if self.counts.documents == 0 {
            let names: Vec<_> = files.iter().map(|f| format!("`{}`", f.display())).collect();
            return Err(Error::new(Kind::Data, format!("there is no text in {}", names.join(", "))));
        }

        let io = |e| Error::io("write to", self.dir, e);
        let header = head(key, &self.hash.finalize().into(), &self.counts);
        let mut file = self.out.into_inner().map_err(|e| io(e.into_error()))?;
        file.seek(SeekFrom::Start(0)).and_then(|_| file.write_all(&header)).map_err(io)?;
        file.as_file().sync_all().map_err(io)?;
        file.persist(path).map_err(|e| Error::io("write", path, e.error))?;
        Ok(())
    }

    fn add(&mut self, document: sources::Document) -> Result<()> {
        match document.content {
            Content::Text(text) => self.add_text(text, self.around.text),
            Content::Answer { prompt, answer } => {
                let Joins { bos, eos } = self.around.alpaca;
                let learned = if self.mask_prompt { Vec::new() } else { whole() };
                self.push(Part { text: prompt, bos, eos: None, learned })?;
                self.add_text(answer, Joins { bos: None, eos })
            }
            Content::Chat(chat) => self.add_chat(&chat).map_err(|mut e| {
                e.message = format!("{}: {}", document.origin, e.message);
                e
            }),
        }
    }

    fn add_text(&mut self, mut rest: String, Joins { mut bos, eos }: Joins) -> Result<()> {
        while rest.len() > PIECE {
            let limit = rest.floor_char_boundary(PIECE);
            let cut = rest[..limit].rfind('\n').map_or(limit, |at| at + 1);
            let tail = rest.split_off(cut);
            self.push(Part { text: rest, bos: bos.take(), eos: None, learned: whole() })?;
            rest = tail;
        }
        self.push(Part { text: rest, bos, eos, learned: whole() })
    }

    /// A conversation is encoded whole, as a program that chats encodes it; what is masked is found by its bytes.
    fn add_chat(&mut self, chat: &Chat) -> Result<()> {
        let Some(template) = self.tokenizer.chat_template() else {
            return Err(Error::new(Kind::Data, "a conversation, but the model has no chat template").hint(
                "put the `chat_template.jinja` that fits into the model's folder; rows with a field of plain text are \
                 read with `--set data.format=text`",
            ));
        };
        let Joins { bos, eos } = self.around.chat;
        if self.mask_prompt {
            let rendered = template.conversation(chat)?;
            return self.push(Part { text: rendered.text, bos, eos, learned: rendered.answers });
        }
        self.push(Part { text: template.render(chat, false)?, bos, eos, learned: whole() })
    }

    fn push(&mut self, part: Part) -> Result<()> {
        self.waiting += part.text.len();
        self.parts.push(part);
        if self.waiting >= BATCH { self.flush() } else { Ok(()) }
    }

    fn flush(&mut self) -> Result<()> {
        if stop_requested() {
            return Err(Error::new(Kind::Interrupted, "stopped while tokenising"));
        }
        let parts = std::mem::take(&mut self.parts);
        self.waiting = 0;
        let encodings = self.tokenizer.encode_batch(parts.iter().map(|p| p.text.as_str()).collect())?;
        let mut tokens = Vec::new();
        for (part, encoding) in parts.iter().zip(&encodings) {
            // An empty answer still ends with what is to be learned.
            let masked = part.learned.is_empty();
            tokens.extend(part.bos.map(|id| Token::new(id, 0, masked)));
            // A token stands for the text from the end of the one before it to its own end, the last one for all that
            // is left; what does not fit goes to the next token, so that the sum stays exact.
            let (mut seen, last) = (0, encoding.len().saturating_sub(1));
            let mut learned = part.learned.iter().peekable();
            for (i, (&id, &(start, end))) in encoding.get_ids().iter().zip(encoding.get_offsets()).enumerate() {
                let begin = start.min(seen);
                let end = if i == last { part.text.len() } else { end };
                let bytes = end.saturating_sub(seen).min(Token::MAX_BYTES);
                seen += bytes;
                while learned.next_if(|range| range.end <= begin).is_some() {}
                let masked = learned.peek().is_none_or(|range| range.start >= end && range.start > begin);
                tokens.push(Token::new(id, bytes, masked));
            }
            tokens.extend(part.eos.map(|id| Token::new(id, 0, masked)));
            self.counts.bytes += seen as u64;
        }
        self.counts.tokens += tokens.len() as u64;
        self.counts.masked += tokens.iter().filter(|t| t.masked()).count() as u64;
        let bytes: Vec<u8> = tokens.iter().flat_map(|t| t.0.to_le_bytes()).collect();
        self.hash.update(&bytes);
        self.out.write_all(&bytes).map_err(|e| Error::io("write to", self.dir, e))
    }
}

/// All there is, tokens at the very end that stand for no bytes too.
#[allow(clippy::single_range_in_vec_init)]
fn whole() -> Vec<Range<usize>> {
    vec![0..usize::MAX]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_keeps_its_three_parts() {
        for (id, bytes, masked) in [(0, 0, false), (1, 255, true), (128_255, 7, false), ((1 << 23) - 1, 255, true)] {
            let token = Token::new(id, bytes, masked);
            assert_eq!((token.id(), token.bytes(), token.masked()), (id, bytes, masked));
        }
    }

    #[test]
    fn counts_survive_the_header() {
        let counts = Counts { documents: 3, tokens: 1 << 40, bytes: 258, masked: 7 };
        let head = head(&[1; 32], &[2; 32], &counts);
        assert_eq!(head.len(), 104);
        assert_eq!(Counts::parse(&head[72..]), counts);
    }
}
