// The page that a server sends.

import { askServer } from "./server.js";
import { explore } from "./page.js";

explore(document.getElementById("explorer"), askServer(), true, askServer);
