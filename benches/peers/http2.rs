//! The little of HTTP/2 that a client of gRPC needs: it costs a fraction of a whole client, so that one core drives a
//! server on another to its end.

use bytes::{Buf, BytesMut};

use crate::protocol::Broken;

const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
const HEAD: usize = 9;

const DATA: u8 = 0;
const HEADERS: u8 = 1;
const RESET: u8 = 3;
const SETTINGS: u8 = 4;
const PING: u8 = 6;
const GO_AWAY: u8 = 7;
const WINDOW_UPDATE: u8 = 8;

const END_STREAM: u8 = 1;
const ACK: u8 = 1;
const END_HEADERS: u8 = 4;

/// What every server takes.
const LARGEST_FRAME: usize = 16_384;

/// What all streams of a connection may bring before it is told that more may come, and when that is told.
const WINDOW: u32 = (1 << 31) - 1;
const FIRST_WINDOW: u32 = 65_535;
const RENEWED: u32 = 1 << 30;

/// One connection to a server, of calls of one method.
pub(crate) struct Http2 {
    path: &'static str,
    authority: String,
    next_stream: u32,
    /// Bytes that the server takes before it says that it takes more.
    sendable: i64,
    received: u32,
}

/// What comes of a stream.
pub(crate) enum Frame {
    /// The server has said how it wants it.
    Settings,
    Data {
        stream: u32,
        bytes: BytesMut,
        ends: bool,
    },
    /// A head or trailers.
    Headers {
        stream: u32,
        ends: bool,
    },
    Reset {
        stream: u32,
    },
}

impl Http2 {
    pub(crate) fn new(path: &'static str, authority: String) -> Self {
        Self { path, authority, next_stream: 1, sendable: FIRST_WINDOW.into(), received: 0 }
    }

    /// Each stream may bring `window` bytes before anybody reads them.
    pub(crate) fn begin(&self, window: u32, out: &mut Vec<u8>) {
        const ENABLE_PUSH: u16 = 2;
        const INITIAL_WINDOW: u16 = 4;
        out.extend_from_slice(PREFACE);
        head(out, 12, SETTINGS, 0, 0);
        for (setting, value) in [(ENABLE_PUSH, 0), (INITIAL_WINDOW, window)] {
            out.extend_from_slice(&setting.to_be_bytes());
            out.extend_from_slice(&value.to_be_bytes());
        }
        head(out, 4, WINDOW_UPDATE, 0, 0);
        out.extend_from_slice(&(WINDOW - FIRST_WINDOW).to_be_bytes());
    }

    pub(crate) const WINDOW: u32 = WINDOW;

    /// Opens a stream with one message of gRPC, the last one unless the stream goes on.
    pub(crate) fn open(&mut self, message: &[u8], goes_on: bool, out: &mut Vec<u8>) -> u32 {
        let stream = self.next_stream;
        self.next_stream += 2;
        let block = self.headers(stream == 1);
        head(out, block.len(), HEADERS, END_HEADERS, stream);
        out.extend_from_slice(&block);
        let mut body = vec![0];
        body.extend_from_slice(&(message.len() as u32).to_be_bytes());
        body.extend_from_slice(message);
        self.sendable -= body.len() as i64;
        let mut left = body.len();
        for part in body.chunks(LARGEST_FRAME) {
            left -= part.len();
            head(out, part.len(), DATA, if left > 0 || goes_on { 0 } else { END_STREAM }, stream);
            out.extend_from_slice(part);
        }
        stream
    }

    /// In full the first time, and from then on by the server's memory of it (RFC 7541), as every client does it.
    fn headers(&self, is_first: bool) -> Vec<u8> {
        const POST: u8 = 0x83;
        const HTTP: u8 = 0x86;
        if !is_first {
            // The last five of the dynamic table, which begins at 62.
            return vec![POST, HTTP, 0x80 | 66, 0x80 | 65, 0x80 | 64, 0x80 | 63, 0x80 | 62];
        }
        let mut block = vec![POST, HTTP];
        // A name by its place in the static table, or as it is.
        let mut add = |name: Result<u8, &str>, value: &str| {
            match name {
                Ok(place) => block.push(0x40 | place),
                Err(name) => {
                    block.extend_from_slice(&[0x40, name.len() as u8]);
                    block.extend_from_slice(name.as_bytes());
                }
            }
            block.push(value.len() as u8);
            block.extend_from_slice(value.as_bytes());
        };
        add(Ok(4), self.path);
        add(Ok(1), &self.authority);
        add(Err("te"), "trailers");
        add(Ok(31), "application/grpc");
        add(Ok(58), "peers");
        block
    }

    /// The next frame of a stream, if one is there as a whole; what is of the connection is answered here.
    pub(crate) fn frame(&mut self, input: &mut BytesMut, out: &mut Vec<u8>) -> Result<Option<Frame>, Broken> {
        loop {
            let Some(&[a, b, c, kind, flags, s, t, u, v]) = input.first_chunk::<HEAD>() else { return Ok(None) };
            let length = u32::from_be_bytes([0, a, b, c]) as usize;
            let stream = u32::from_be_bytes([s, t, u, v]) & (WINDOW);
            if input.len() < HEAD + length {
                return Ok(None);
            }
            input.advance(HEAD);
            let mut bytes = input.split_to(length);
            let ends = flags & END_STREAM != 0;
            match kind {
                DATA => {
                    self.receive(length as u32, out);
                    return Ok(Some(Frame::Data { stream, bytes, ends }));
                }
                HEADERS => return Ok(Some(Frame::Headers { stream, ends })),
                RESET => return Ok(Some(Frame::Reset { stream })),
                SETTINGS if flags & ACK == 0 => {
                    head(out, 0, SETTINGS, ACK, 0);
                    return Ok(Some(Frame::Settings));
                }
                PING if flags & ACK == 0 => {
                    head(out, length, PING, ACK, 0);
                    out.extend_from_slice(&bytes);
                }
                WINDOW_UPDATE if stream == 0 => self.sendable += i64::from(bytes.get_u32()),
                GO_AWAY => return Err(Broken(format!("the server goes away: {}", bytes.escape_ascii()))),
                _ => {}
            }
        }
    }

    /// Whether the server has taken no more than it wanted.
    pub(crate) fn check(&self) -> Result<(), Broken> {
        if self.sendable >= 0 { Ok(()) } else { Err(Broken("more was sent than the server takes".to_owned())) }
    }

    fn receive(&mut self, bytes: u32, out: &mut Vec<u8>) {
        self.received += bytes;
        if self.received >= RENEWED {
            head(out, 4, WINDOW_UPDATE, 0, 0);
            out.extend_from_slice(&self.received.to_be_bytes());
            self.received = 0;
        }
    }
}

fn head(out: &mut Vec<u8>, length: usize, kind: u8, flags: u8, stream: u32) {
    out.extend_from_slice(&(length as u32).to_be_bytes()[1..]);
    out.extend_from_slice(&[kind, flags]);
    out.extend_from_slice(&stream.to_be_bytes());
}
