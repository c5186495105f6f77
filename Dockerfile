# The server, see docs/server.md. TORCH is where torch comes from: by default its builds for the CPU, a fifth of the size.
FROM python:3.12-slim
ARG TORCH=https://download.pytorch.org/whl/cpu

RUN useradd --create-home --uid 1000 pbe && install -d -o pbe /files /models
WORKDIR /app
# torch first: a change of the library leaves its layer as it is
RUN pip install --no-cache-dir --index-url "$TORCH" torch torchvision
COPY setup.py pyproject.toml README.md LICENSE ./
COPY pbe pbe
RUN pip install --no-cache-dir '.[serve,safetensors]'

USER 1000
VOLUME /files
EXPOSE 8000
HEALTHCHECK --interval=30s --timeout=5s --start-period=120s \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/healthz', timeout=4)"]
# a token must be given, as PBE_TOKEN or with --token-file
ENTRYPOINT ["pbe", "serve", "--host", "0.0.0.0", "--files", "/files"]
CMD ["demo"]
