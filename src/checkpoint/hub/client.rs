//! Requests to a hub. Redirects are followed here, so that only the hub gets the token and every answer is checked.

use std::io::Read;
use std::time::Duration;

use serde::de::DeserializeOwned;
use ureq::http::header::{ACCEPT_ENCODING, AUTHORIZATION, CONTENT_RANGE, ETAG, LOCATION, RANGE};
use ureq::http::{HeaderMap, Response, StatusCode, Uri};
use ureq::tls::{RootCerts, TlsConfig};
use ureq::{Agent, Body};

use super::super::error::CheckpointError;
use super::names::shown;

const MOST_REDIRECTS: usize = 10;

/// Longest listing of a repository, in bytes.
const LONGEST_LISTING: u64 = 256 << 20;

/// Why a file was not downloaded.
#[derive(Debug)]
pub(super) enum Fault {
    /// Another try may succeed.
    Network(String),
    /// The hub refuses the request.
    Refused(String),
    /// The answer of the hub must not be used.
    Untrusted(String),
    /// The cache cannot be written.
    Local(CheckpointError),
}

pub(super) type Result<T, E = Fault> = std::result::Result<T, E>;

pub(super) struct Client {
    agent: Agent,
    endpoint: String,
    /// Who gets the token.
    origin: Option<Origin>,
    token: Option<String>,
}

type Origin = (String, String, Option<u16>);

/// A body, with the headers of all answers on the way to it. Names in them come from the server and are not checked
/// yet.
pub(super) struct Answer {
    body: Body,
    pub etag: Option<String>,
    pub commit: Option<String>,
    /// Bytes of the whole file.
    pub size: Option<u64>,
    /// Offset of the body in the file.
    pub begin: u64,
}

impl Client {
    /// # Errors
    /// The endpoint is not an address.
    pub fn new(endpoint: String, token: Option<String>, timeout: Duration) -> Result<Self> {
        let uri: Uri = endpoint.parse().map_err(|e| {
            Fault::Refused(format!("`HF_ENDPOINT` is `{}`, which is not an address: {e}", shown(&endpoint)))
        })?;
        let agent = Agent::config_builder()
            .user_agent(concat!("lrc/", env!("CARGO_PKG_VERSION")))
            .http_status_as_error(false)
            .max_redirects(0)
            .timeout_resolve(Some(timeout))
            .timeout_connect(Some(timeout))
            .timeout_recv_response(Some(timeout))
            .timeout_per_read(Some(timeout))
            .tls_config(TlsConfig::builder().root_certs(RootCerts::PlatformVerifier).build())
            .build()
            .into();
        Ok(Self { agent, endpoint, origin: origin(&uri), token })
    }

    /// A record of the API.
    ///
    /// # Errors
    /// The request fails, or the answer has another form.
    pub fn record<T: DeserializeOwned>(&self, path: &str) -> Result<T> {
        let (response, _) = self.follow(&format!("{}/api/{path}", self.endpoint), 0)?;
        let mut body = response.into_body();
        let bytes = body.with_config().limit(LONGEST_LISTING).read_to_vec().map_err(fault)?;
        serde_json::from_slice(&bytes)
            .map_err(|e| Fault::Refused(format!("the answer for `{path}` is not as expected: {e}")))
    }

    /// A file of a repository, from byte `begin` on if the server can.
    ///
    /// # Errors
    /// The request fails.
    pub fn file(&self, repo: &str, commit: &str, name: &str, begin: u64) -> Result<Answer> {
        let url = format!("{}/{repo}/resolve/{commit}/{}", self.endpoint, encoded(name));
        let (response, said) = self.follow(&url, begin)?;
        let is_partial = response.status() == StatusCode::PARTIAL_CONTENT;
        let rest = response.body().content_length();
        let expected = format!("bytes {begin}-");
        let is_rest =
            header(response.headers(), CONTENT_RANGE.as_str()).is_some_and(|range| range.starts_with(&expected));
        if is_partial && !is_rest {
            return Err(Fault::Refused(format!("`{name}` comes from another byte on than {begin}")));
        }
        let begin = if is_partial { begin } else { 0 };
        let first = |name: &str| said.iter().find_map(|headers| header(headers, name));
        Ok(Answer {
            etag: said.iter().find_map(|h| header(h, "x-linked-etag").or_else(|| header(h, ETAG.as_str()))),
            commit: first("x-repo-commit"),
            size: first("x-linked-size").and_then(|size| size.parse().ok()).or(rest.map(|rest| begin + rest)),
            begin,
            body: response.into_body(),
        })
    }

    /// The answer at the end of all redirects, and the headers of all answers on the way there.
    fn follow(&self, url: &str, begin: u64) -> Result<(Response<Body>, Vec<HeaderMap>)> {
        let mut uri: Uri =
            url.parse().map_err(|e| Fault::Refused(format!("`{}` is not an address: {e}", shown(url))))?;
        let mut said = Vec::new();
        for _ in 0..MOST_REDIRECTS {
            let mut request = self.agent.get(&uri).header(ACCEPT_ENCODING, "identity");
            if begin > 0 {
                request = request.header(RANGE, format!("bytes={begin}-"));
            }
            if let Some(token) = self.token.as_ref().filter(|_| origin(&uri) == self.origin) {
                request = request.header(AUTHORIZATION, format!("Bearer {token}"));
            }
            let response = request.call().map_err(fault)?;
            said.push(response.headers().clone());
            let status = response.status();
            if status.is_success() {
                return Ok((response, said));
            }
            let location = header(response.headers(), LOCATION.as_str()).filter(|_| status.is_redirection());
            let Some(location) = location else { return Err(refusal(status, response.headers(), &uri)) };
            let unusable = || Fault::Refused(format!("the server redirects to `{}`", shown(&location)));
            uri = redirected(&uri, &location).ok_or_else(unusable)?;
        }
        Err(Fault::Refused(format!("more than {MOST_REDIRECTS} redirects, the last to `{}`", shown(&uri.to_string()))))
    }
}

impl Answer {
    /// Reads a chunk of the body; 0 bytes at its end.
    ///
    /// # Errors
    /// The connection is lost.
    pub fn read(&mut self, chunk: &mut [u8]) -> std::io::Result<usize> {
        self.body.as_reader().read(chunk)
    }
}

fn header(headers: &HeaderMap, name: &str) -> Option<String> {
    headers.get(name).map(|value| String::from_utf8_lossy(value.as_bytes()).into_owned())
}

/// The meaning of a status, with the hub's own message.
fn refusal(status: StatusCode, headers: &HeaderMap, uri: &Uri) -> Fault {
    let words = header(headers, "x-error-message").or_else(|| header(headers, "x-error-code"));
    let words = words.map(|words| format!(" ({})", shown(&words))).unwrap_or_default();
    let reason = format!("`{}` answers {status}{words}", shown(&uri.to_string()));
    let is_transient = matches!(status, StatusCode::REQUEST_TIMEOUT | StatusCode::TOO_MANY_REQUESTS);
    if status.is_server_error() || is_transient { Fault::Network(reason) } else { Fault::Refused(reason) }
}

fn fault(error: ureq::Error) -> Fault {
    use ureq::Error::*;
    let is_refused = matches!(
        error,
        Http(_) | BadUri(_) | InvalidProxyUrl | BodyExceedsLimit(_) | LargeResponseHeader(..) | RequireHttpsOnly(_)
    );
    let reason = error.to_string();
    if is_refused { Fault::Refused(reason) } else { Fault::Network(reason) }
}

fn origin(uri: &Uri) -> Option<Origin> {
    let scheme = uri.scheme_str()?.to_lowercase();
    let default = if scheme == "https" { 443 } else { 80 };
    Some((scheme, uri.host()?.to_lowercase(), Some(uri.port_u16().unwrap_or(default))))
}

/// The address that an answer of `from` redirects to.
fn redirected(from: &Uri, location: &str) -> Option<Uri> {
    let (scheme, authority) = (from.scheme_str()?, from.authority()?);
    let target = if location.starts_with("//") {
        format!("{scheme}:{location}")
    } else if location.starts_with('/') {
        format!("{scheme}://{authority}{location}")
    } else if location.split_once("://").is_some_and(|(scheme, _)| scheme.chars().all(|c| c.is_ascii_alphanumeric())) {
        location.to_string()
    } else {
        let folder = from.path().rsplit_once('/').map_or("", |(folder, _)| folder);
        format!("{scheme}://{authority}{folder}/{location}")
    };
    let target: Uri = target.parse().ok()?;
    matches!(target.scheme_str(), Some("http" | "https")).then_some(target)
}

/// The name of a file as a path of a URL.
fn encoded(name: &str) -> String {
    let encode = |byte: u8| match byte {
        b'A'..=b'Z' | b'a'..=b'z' | b'0'..=b'9' | b'-' | b'_' | b'.' | b'~' | b'/' => char::from(byte).to_string(),
        _ => format!("%{byte:02X}"),
    };
    name.bytes().map(encode).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn redirects_lead_where_a_browser_would_go() {
        let from: Uri = "https://hub.test:8443/a/b/c?x=1".parse().unwrap();
        for (location, expected) in [
            ("/d", Some("https://hub.test:8443/d")),
            ("d?to=https://x.test/", Some("https://hub.test:8443/a/b/d?to=https://x.test/")),
            ("//cdn.test/d", Some("https://cdn.test/d")),
            ("http://cdn.test/d?y", Some("http://cdn.test/d?y")),
            ("file:///etc/passwd", None),
        ] {
            assert_eq!(redirected(&from, location).map(|uri| uri.to_string()).as_deref(), expected, "{location}");
        }
    }

    #[test]
    fn an_origin_is_scheme_host_and_port() {
        let of = |uri: &str| origin(&uri.parse().unwrap());
        assert_eq!(of("https://Hub.test/a"), of("https://hub.test:443/b?c"));
        for other in ["http://hub.test", "https://hub.test:444", "https://cdn.hub.test", "https://hub.test.evil"] {
            assert_ne!(of("https://hub.test"), of(other), "{other}");
        }
    }

    #[test]
    fn names_are_encoded_for_a_url() {
        assert_eq!(encoded("a b/é#?.json"), "a%20b/%C3%A9%23%3F.json");
    }
}
