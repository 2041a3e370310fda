//! The hub in a build without the feature `hub`: every use is refused with what to do.

use std::path::{Path, PathBuf};

use super::{Headers, HubId};
use crate::error::{Error, Kind, Result};
use crate::progress::Progress;

fn refuse<T>(id: &HubId) -> Result<T> {
    let error = Error::new(Kind::Hub, format!("`{id}` is a hub id, and this build cannot reach the hub"));
    Err(error.hint("build with `--features hub`, or download it by other means and give the local folder"))
}

pub fn headers(id: &HubId) -> Result<Headers> {
    refuse(id)
}

pub fn fetch_model(id: &HubId, _: &dyn Progress) -> Result<(PathBuf, String)> {
    refuse(id)
}

pub fn fetch_dataset(id: &HubId, _: &dyn Progress) -> Result<Vec<PathBuf>> {
    refuse(id)
}

pub fn push(_: &Path, id: &HubId, _: bool, _: &dyn Progress) -> Result<String> {
    refuse(id)
}
