FROM rust:1.95-slim-bookworm AS build
WORKDIR /build

# The dependencies, in a layer that stays as long as they do: built for stand-ins of our own sources.
COPY Cargo.toml Cargo.lock build.rs ./
COPY proto proto
RUN mkdir src migrations \
    && echo 'fn main() {}' > src/main.rs \
    && touch src/lib.rs \
    && cargo build --locked --profile dist --bin rolecache \
    && rm -r src migrations

COPY migrations migrations
COPY src src
# Newer than the stand-ins, so that cargo notices.
RUN touch build.rs src/main.rs src/lib.rs \
    && cargo build --locked --profile dist --bin rolecache

FROM debian:bookworm-slim
RUN useradd --system --uid 10001 --user-group --home-dir /data --create-home --shell /usr/sbin/nologin rolecache
COPY --from=build /build/target/dist/rolecache /usr/local/bin/rolecache
USER 10001:10001

# The SQLite file lives here where no other store is named.
WORKDIR /data
VOLUME /data

# Within the container every address; who reaches it from outside is up to the published port.
ENV ROLECACHE_LISTEN=0.0.0.0:50051
EXPOSE 50051
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=5s --timeout=3s --start-period=60s --retries=3 \
    CMD ["rolecache", "healthcheck", "--timeout", "2s"]
ENTRYPOINT ["rolecache"]
CMD ["serve"]
