//! One request to the hub and what its failure means.

use std::time::Duration;

use ureq::Body;
use ureq::http::Response;

use super::{Hub, Options};
use crate::checkpoint::HubId;
use crate::error::{Error, Kind, Result};
use crate::progress::stop_requested;

/// Why an attempt failed.
pub(super) enum Trouble {
    Final(Error),
    /// Worth another attempt; `advanced` when this one brought something new.
    Passing {
        error: Error,
        advanced: bool,
    },
}

impl From<Error> for Trouble {
    fn from(error: Error) -> Self {
        Trouble::Final(error)
    }
}

impl Hub {
    /// Repeats an attempt while that may help, with growing pauses.
    pub(super) fn retry<T>(&self, mut attempt: impl FnMut() -> Result<T, Trouble>) -> Result<T> {
        let mut failed = 0;
        loop {
            match attempt() {
                Ok(value) => return Ok(value),
                Err(Trouble::Final(error)) => return Err(error),
                Err(Trouble::Passing { error, advanced }) => {
                    failed = if advanced { 1 } else { failed + 1 };
                    if failed > self.options.retries {
                        return Err(error);
                    }
                    tracing::info!("{error}; trying again");
                }
            }
            if stop_requested() {
                return Err(Error::new(Kind::Interrupted, "stopped while waiting for the hub"));
            }
            std::thread::sleep(Duration::from_millis(250 << failed.min(5)));
        }
    }

    /// One request, from byte `range.0` to byte `range.1` inclusive; success is 200 or 206.
    pub(super) fn get(
        &self,
        url: &str,
        range: Option<(u64, Option<u64>)>,
        id: &HubId,
        file: Option<&str>,
    ) -> Result<Response<Body>, Trouble> {
        let mut request = self.agent.get(url);
        if let Some(token) = &self.options.token {
            request = request.header("Authorization", format!("Bearer {token}"));
        }
        if let Some((start, end)) = range {
            let end = end.map(|e| e.to_string()).unwrap_or_default();
            request = request.header("Range", format!("bytes={start}-{end}"));
        }
        let response = request.call().map_err(|e| match (&e, self.cut(&e, false)) {
            // These do not pass by themselves.
            (ureq::Error::HostNotFound | ureq::Error::BadUri(_), Trouble::Passing { error, .. }) => error.into(),
            (_, trouble) => trouble,
        })?;
        match response.status().as_u16() {
            200 | 206 => Ok(response),
            status => Err(self.refused(status, id, file)),
        }
    }

    /// A whole answer, and the length of the file it is part of; longer answers than `limit` are refused.
    pub(super) fn read_body(
        &self,
        url: &str,
        range: Option<(u64, Option<u64>)>,
        limit: u64,
        id: &HubId,
        file: Option<&str>,
    ) -> Result<(Vec<u8>, u64), Trouble> {
        let mut response = self.get(url, range, id, file)?;
        let total = content_range(&response).map(|(_, total)| total);
        if range.is_some() && total.is_none() {
            let error = Error::new(Kind::Hub, format!("`{}` does not serve parts of files", self.options.endpoint));
            return Err(error.hint("download the model first, and give the local folder").into());
        }
        let bytes = response.body_mut().with_config().limit(limit).read_to_vec().map_err(|e| self.cut(&e, false))?;
        let total = total.unwrap_or(bytes.len() as u64);
        Ok((bytes, total))
    }

    /// No answer, or one that ended early.
    pub(super) fn cut(&self, error: &dyn std::error::Error, advanced: bool) -> Trouble {
        let message = format!("the connection to `{}` failed: {error}", self.options.endpoint);
        let error = Error::new(Kind::Hub, message).hint(
            "check the network, proxy and HF_ENDPOINT, then run the same command again: downloads continue where they \
             stopped; HF_HUB_OFFLINE=1 uses what is already in the cache",
        );
        Trouble::Passing { error, advanced }
    }

    /// An answer that is a refusal.
    pub(super) fn refused(&self, status: u16, id: &HubId, file: Option<&str>) -> Trouble {
        let Options { endpoint, token, .. } = &self.options;
        let what = file.map_or(format!("`{id}`"), |file| format!("`{file}` of `{id}`"));
        let error =
            |message: String, hint: &str| Error::new(Kind::Hub, format!("{message} (HTTP {status})")).hint(hint);
        match status {
            401 | 403 => {
                let login = match token {
                    Some(_) => "check that HF_TOKEN may read it",
                    None => "set HF_TOKEN to an access token",
                };
                let hint = format!(
                    "check the spelling (there is no local folder of this name); if it is gated or private, accept its \
                     licence at {endpoint}/{} and {login}",
                    id.repo
                );
                Trouble::Final(error(format!("the hub does not allow reading {what}"), &hint))
            }
            404 => {
                let hint = format!(
                    "check the spelling and that revision `{}` exists; there is no local folder of this name either",
                    id.revision
                );
                Trouble::Final(error(format!("{what} is not on the hub"), &hint))
            }
            429 | 500..=599 => {
                let error = error(format!("the hub is busy and did not give {what}"), "try again in some minutes");
                Trouble::Passing { error, advanced: false }
            }
            _ => Trouble::Final(error(format!("the hub did not give {what}"), "check HF_ENDPOINT")),
        }
    }
}

/// First byte and total length of a `Content-Range: bytes 5-9/100`.
pub(super) fn content_range(response: &Response<Body>) -> Option<(u64, u64)> {
    let value = response.headers().get("content-range")?.to_str().ok()?;
    let (range, total) = value.strip_prefix("bytes ")?.split_once('/')?;
    Some((range.split('-').next()?.parse().ok()?, total.parse().ok()?))
}
