//! What is kept of a request's head while its message comes: tonic holds all of it, and who sends thousands of large heads and no
//! message would fill the memory.

use http::{
    HeaderMap, HeaderName, HeaderValue, Request, Uri,
    header::{CONTENT_TYPE, TE},
};

/// Bytes and headers of a head that stays as it is.
const LIGHT: usize = 1_024;
const FEW: usize = 24;

const ENCODING: HeaderName = HeaderName::from_static("grpc-encoding");
const ACCEPTS: HeaderName = HeaderName::from_static("grpc-accept-encoding");

/// Longer than any list of encodings that there are.
const LONGEST: usize = 256;

/// Its bytes, at least as many as have come for it.
pub(super) fn bytes<B>(request: &Request<B>) -> usize {
    let uri = request.uri();
    let of_uri = [uri.path_and_query().map(|it| it.as_str().len()), uri.authority().map(|it| it.as_str().len())];
    let of_headers = request.headers().iter().map(|(name, value)| name.as_str().len() + value.len());
    of_uri.into_iter().flatten().chain(of_headers).sum()
}

/// Lets go of what nobody asks for any more, once it is known who calls what until when.
pub(super) fn lighten<B>(request: &mut Request<B>) {
    let headers = request.headers();
    if bytes(request) <= LIGHT && headers.len() <= FEW {
        return;
    }
    let mut kept = HeaderMap::new();
    kept.insert(CONTENT_TYPE, HeaderValue::from_static("application/grpc"));
    kept.insert(TE, HeaderValue::from_static("trailers"));
    for name in [ENCODING, ACCEPTS] {
        if let Some(value) = headers.get(&name) {
            kept.insert(name, copied(value));
        }
    }
    // A copy too: as it came it keeps the memory of all the others.
    let path = request.uri().path().parse::<Uri>();
    *request.headers_mut() = kept;
    if let Ok(path) = path {
        *request.uri_mut() = path;
    }
}

/// An encoding that nobody has stays one.
fn copied(value: &HeaderValue) -> HeaderValue {
    let value = value.as_bytes().get(..LONGEST).unwrap_or(value.as_bytes());
    HeaderValue::from_bytes(value).unwrap_or(HeaderValue::from_static("unknown"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(headers: usize) -> Request<()> {
        let mut request = Request::post("http://somewhere/rolecache.v1.RoleCacheService/GetRole").body(()).unwrap();
        request.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/grpc+proto"));
        request.headers_mut().insert(ENCODING, HeaderValue::from_static("gzip"));
        for n in 0..headers {
            let name: HeaderName = format!("x{n}").parse().unwrap();
            request.headers_mut().insert(name, HeaderValue::from_static(""));
        }
        request
    }

    #[test]
    fn a_light_head_stays() {
        let mut light = request(8);
        lighten(&mut light);
        assert_eq!((light.headers().len(), light.uri().host()), (10, Some("somewhere")));
    }

    #[test]
    fn a_long_query_is_heavy_too() {
        let mut heavy = request(0);
        *heavy.uri_mut() = format!("{}?{}", heavy.uri().path(), "q".repeat(9_000)).parse().unwrap();
        lighten(&mut heavy);
        assert_eq!(heavy.uri(), "/rolecache.v1.RoleCacheService/GetRole");
    }

    #[test]
    fn of_a_heavy_one_stays_what_the_message_is_read_by() {
        let mut heavy = request(400);
        heavy.headers_mut().insert(ACCEPTS, HeaderValue::from_str(&"a".repeat(9_000)).unwrap());
        lighten(&mut heavy);
        assert_eq!(heavy.headers().len(), 4);
        assert_eq!(heavy.headers()[ENCODING], "gzip");
        assert_eq!(heavy.headers()[ACCEPTS].len(), LONGEST);
        assert_eq!(heavy.uri(), "/rolecache.v1.RoleCacheService/GetRole");
    }
}
