// An OPC UA server by node-opcua, ruled by one JSON object a line on standard input; each is answered by one line.
//
// The one argument is a JSON object: {port, uri, folder, certificate, key, password}; `folder` holds the PKI folders
// "server" (which gateways are trusted) and "users" (which user certificates are), as node-opcua lays them out.
"use strict";
const readline = require("readline");
const { MonitoredItem, OPCUAServer } = require("node-opcua-server");
const { OPCUACertificateManager } = require("node-opcua-certificate-manager");
const { standardUnits } = require("node-opcua-data-access");
const { MessageSecurityMode, SecurityPolicy } = require("node-opcua-secure-channel");
const { DataType, Variant, VariantArrayType } = require("node-opcua-variant");
const { nodesets } = require("node-opcua-nodesets");

const asked = JSON.parse(process.argv[2]);
MonitoredItem.minimumSamplingInterval = 10; // a PLC samples faster than the 50 ms of this library's default
const variables = {};
const answer = () => process.stdout.write("done\n"); // the library writes warnings to the same stream

function manager(name) {
  return new OPCUACertificateManager({
    rootFolder: `${asked.folder}/${name}`, automaticallyAcceptUnknownCertificate: false, disableFileWatchers: true,
  });
}

function variant(type, value) {
  if (!Array.isArray(value)) return new Variant({ dataType: DataType[type], value });
  return new Variant({ dataType: DataType[type], arrayType: VariantArrayType.Array, value });
}

const verbs = {
  add(space, { name, type, value, range, unit }) {
    const array = Array.isArray(value);
    const options = {
      browseName: name, nodeId: `s=${name}`, dataType: type, value: variant(type, value),
      valueRank: array ? 1 : -1, arrayDimensions: array ? [value.length] : undefined,
      organizedBy: space.addressSpace.rootFolder.objects,
    };
    if (range) {
      const engineeringUnitsRange = { low: range[0], high: range[1] };
      const engineeringUnits = standardUnits[unit];
      variables[name] = space.addAnalogDataItem({ ...options, engineeringUnitsRange, engineeringUnits });
    } else {
      variables[name] = space.addVariable(options);
    }
  },
  put(_space, { name, type, value }) {
    variables[name].setValueFromSource(variant(type, value));
  },
  many(space, { name, count }) {
    const folder = space.addObject({ browseName: name, organizedBy: space.addressSpace.rootFolder.objects });
    for (let n = 0; n < count; n++) {
      space.addVariable({ browseName: `T${n}`, nodeId: `s=${name}.T${n}`, dataType: "Double", componentOf: folder });
    }
  },
  remove(space, { name }) {
    space.deleteNode(variables[name]);
  },
  async reload(_space, _asked, server) { // what was put in the PKI folders
    for (const store of [server.serverCertificateManager, server.userCertificateManager]) {
      await store.reloadCertificates();
    }
  },
  // Forget every session but not its subscriptions, as a server does after the session's time is out.
  drop(_space, _asked, server) {
    for (const { authenticationToken } of Object.values(server.engine._sessions)) {
      server.engine.closeSession(authenticationToken, false, "Timeout");
    }
  },
};

async function main() {
  const server = new OPCUAServer({
    port: asked.port, host: "127.0.0.1", hostname: "127.0.0.1",
    nodeset_filename: [nodesets.standard],
    serverInfo: { applicationUri: asked.uri },
    certificateFile: asked.certificate, privateKeyFile: asked.key,
    serverCertificateManager: manager("server"), userCertificateManager: manager("users"),
    securityModes: [MessageSecurityMode.None, MessageSecurityMode.Sign, MessageSecurityMode.SignAndEncrypt],
    securityPolicies: [
      SecurityPolicy.None, SecurityPolicy.Basic256Sha256,
      SecurityPolicy.Aes128_Sha256_RsaOaep, SecurityPolicy.Aes256_Sha256_RsaPss,
    ],
    allowAnonymous: true,
    userManager: { isValidUser: (name, password) => name === "ot" && password === asked.password },
    serverCapabilities: {
      operationLimits: { maxMonitoredItemsPerCall: 100, maxNodesPerRead: 100, maxNodesPerBrowse: 20 },
    },
  });
  await server.initialize();
  const addressSpace = server.engine.addressSpace;
  addressSpace.registerNamespace("urn:other");
  const space = addressSpace.registerNamespace("urn:rig");
  await server.start();
  answer();
  for await (const line of readline.createInterface({ input: process.stdin })) {
    const asked = JSON.parse(line);
    await verbs[asked.verb](space, asked, server);
    answer();
  }
  await server.shutdown(0);
  process.exit(0);
}

main();
