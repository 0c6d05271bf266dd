//! What a browser could be made to do: requests under a stranger's name (DNS rebinding), from a
//! stranger's page, or a stranger's script in ours.

use hyper::HeaderMap;
use hyper::header::{self, HeaderValue};

use super::body::Response;
use super::error::{ApiError, ApiResult};

/// What the page may load: its own script and style, and nothing else from anywhere.
const POLICY: &str = "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; \
                      img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'";

/// Refuses requests that a page of another origin sends, and, on a server for this machine alone,
/// names that are not this machine's.
pub fn check(headers: &HeaderMap, loopback: bool) -> ApiResult<()> {
    let host = headers.get(header::HOST).and_then(|h| h.to_str().ok()).unwrap_or_default();
    if loopback && !is_loopback(name(host)) {
        let shown: String = host.chars().take(100).collect();
        return Err(ApiError::forbidden(format!(
            "this server answers on this machine alone, as localhost or 127.0.0.1, not as {shown:?}"
        )));
    }
    let Some(origin) = headers.get(header::ORIGIN) else { return Ok(()) };
    let origin = origin.to_str().unwrap_or_default();
    let stands_at = origin.split_once("://").map_or("", |(_, rest)| rest);
    if !host.is_empty() && stands_at.eq_ignore_ascii_case(host) {
        return Ok(());
    }
    let shown: String = origin.chars().take(100).collect();
    Err(ApiError::forbidden(format!("pages of {shown:?} may not use this server")))
}

/// A `Host` without its port.
fn name(host: &str) -> &str {
    match host.rsplit_once(':') {
        Some((name, port)) if port.bytes().all(|b| b.is_ascii_digit()) => name,
        _ => host,
    }
}

fn is_loopback(name: &str) -> bool {
    let name = name.to_ascii_lowercase();
    let name = name.trim_start_matches('[').trim_end_matches(']');
    let address = name.parse::<std::net::IpAddr>();
    name == "localhost" || name.ends_with(".localhost") || address.is_ok_and(|a| a.is_loopback())
}

/// Adds what every answer carries.
pub fn harden(response: &mut Response) {
    let headers = response.headers_mut();
    for (name, value) in [
        (header::CONTENT_SECURITY_POLICY, POLICY),
        (header::X_CONTENT_TYPE_OPTIONS, "nosniff"),
        (header::X_FRAME_OPTIONS, "DENY"),
        (header::REFERRER_POLICY, "no-referrer"),
    ] {
        headers.insert(name, HeaderValue::from_static(value));
    }
    headers.insert("cross-origin-resource-policy", HeaderValue::from_static("same-origin"));
    headers.entry(header::CACHE_CONTROL).or_insert(HeaderValue::from_static("no-store"));
}

#[cfg(test)]
mod tests {
    use super::*;

    fn headers(host: &str, origin: Option<&str>) -> HeaderMap {
        let mut headers = HeaderMap::new();
        headers.insert(header::HOST, HeaderValue::from_str(host).unwrap());
        if let Some(origin) = origin {
            headers.insert(header::ORIGIN, HeaderValue::from_str(origin).unwrap());
        }
        headers
    }

    #[test]
    fn attack_a_name_that_was_pointed_here_or_a_page_from_elsewhere() {
        for host in ["localhost:8000", "127.0.0.1", "127.9.9.9:1", "[::1]:8000", "a.localhost"] {
            assert_eq!(check(&headers(host, None), true), Ok(()), "{host}");
        }
        for host in ["evil.example", "127.0.0.1.evil.example", "localhost.evil", "10.0.0.1", ""] {
            assert!(check(&headers(host, None), true).is_err(), "{host}");
            assert_eq!(check(&headers(host, None), false), Ok(()));
        }
        let own = headers("chat.example:8", Some("https://chat.example:8"));
        assert_eq!(check(&own, false), Ok(()));
        for origin in ["null", "https://evil.example", "http://chat.example", ""] {
            assert!(check(&headers("chat.example:8", Some(origin)), false).is_err(), "{origin}");
        }
    }
}
