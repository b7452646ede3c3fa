// The npm package `socks` as a SOCKS4 client: relays its standard input and output.
//
//   node socks4_client.mjs connect|bind PROXY-PORT HOST PORT [USER]
//
// It asks for 4a where HOST is a name.  For BIND it says on standard error where the
// proxy listens, and who came.

import { SocksClient } from "socks";

const [command, proxyPort, host, port, userId] = process.argv.slice(2);

const client = new SocksClient({
  command,
  proxy: { host: "127.0.0.1", port: Number(proxyPort), type: 4, userId },
  destination: { host, port: Number(port) },
});
client.on("error", (problem) => {
  console.error(`error ${problem.message}`);
  process.exitCode = 1;
});
client.on("bound", ({ remoteHost }) => {
  console.error(`bound ${remoteHost.host}:${remoteHost.port}`);
});
client.on("established", ({ socket, remoteHost }) => {
  if (remoteHost) console.error(`peer ${remoteHost.host}:${remoteHost.port}`);
  process.stdin.pipe(socket);
  socket.pipe(process.stdout);
});
client.connect();
