FROM rust:1.95-slim-bookworm AS build
SHELL ["/bin/bash", "-o", "pipefail", "-c"]
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

# What the binary needs at run time, and nothing else: no shell, no package manager, nothing setuid. The libraries come
# with what Debian says of them, for scanners and for their licences.
RUN mkdir -p /image/usr/local/bin /image/etc /image/var/lib/dpkg/status.d /data \
    && cp target/dist/rolecache /image/usr/local/bin/ \
    && ldd target/dist/rolecache | grep -o '/[^ ]*' | xargs cp --dereference --parents --target-directory=/image \
    && cp --dereference --parents --target-directory=/image /etc/os-release \
        /usr/share/doc/libc6/copyright /usr/share/doc/libgcc-s1/copyright \
    && for package in libc6 libgcc-s1; do dpkg-query --status "$package" > "/image/var/lib/dpkg/status.d/$package"; done \
    && echo 'rolecache:x:10001:10001::/data:/sbin/nologin' > /image/etc/passwd \
    && echo 'rolecache:x:10001:' > /image/etc/group \
    # Without it names are asked of DNS before /etc/hosts.
    && echo 'hosts: files dns' > /image/etc/nsswitch.conf

FROM scratch
COPY --from=build /image /
COPY --from=build --chown=10001:10001 /data /data
ENV PATH=/usr/local/bin
USER 10001:10001

# The SQLite file lives here where no other store is named. Nothing is ever written elsewhere: SQLite's own temporary
# files too come here, since there is no /tmp. So the root file system can be read-only.
WORKDIR /data
VOLUME /data

# Within the container every address; who reaches it from outside is up to the published port. It starts only with TLS and
# credentials, or with ROLECACHE_INSECURE=true where the port is published to nobody else.
ENV ROLECACHE_LISTEN=0.0.0.0:50051
EXPOSE 50051
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=5s --timeout=3s --start-period=60s --retries=3 \
    CMD ["rolecache", "healthcheck", "--timeout", "2s"]
ENTRYPOINT ["rolecache"]
CMD ["serve"]
