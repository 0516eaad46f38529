import java.io.Closeable
import java.io.File
import java.io.IOException
import java.net.HttpURLConnection
import java.net.URL
import java.util.Base64
import org.json.JSONArray
import org.json.JSONObject

/**
 * Asks an OpenAI-compatible server on this phone for the next action, one screenshot at a time.
 *
 * Knows HTTP and the layout of the phone agent's messages; runs no action. Uses what every Android since
 * API 26 has, and on a desktop a JVM and org.json. Blocks while it reads: call it from a thread of your
 * own, and [close] from any other to stop the work.
 *
 * @param base the server's address with its version, as OpenAI's clients take it
 * @param systemPrompt describes the actions to the model; without it the model must know them
 */
class AutoGlmClient(
    private val base: String = "http://127.0.0.1:8000/v1",
    systemPrompt: String? = null
) : Closeable {
    private val history = ArrayList<JSONObject>()
    @Volatile private var connection: HttpURLConnection? = null

    init {
        if (systemPrompt != null) history.add(message("system", systemPrompt))
    }

    /**
     * One step: shows the screen, returns the model's answer.
     *
     * @param screenshot a PNG or JPEG file's bytes, at the screen's own size
     * @param currentApp the app on the screen, as the model should know it
     * @param task what the user wants, on the first step; null on the following ones
     * @param onText gets each piece of the answer as it arrives
     * @return thinking and action: `<think>…</think><answer>do(action="Tap", element=[500,120])</answer>`;
     *     coordinates are thousandths of the screen's width and height
     * @throws IOException with the server's own words, or if it cannot be reached
     */
    fun step(screenshot: ByteArray, currentApp: String, task: String?, onText: (String) -> Unit): String {
        val words = "${task ?: "** Screen Info **"}\n\n{\"current_app\": ${JSONObject.quote(currentApp)}}"
        val image = JSONObject().put("url", dataUrl(screenshot))
        val parts = JSONArray()  // the image first: the model was trained so
            .put(JSONObject().put("type", "image_url").put("image_url", image))
            .put(JSONObject().put("type", "text").put("text", words))
        val answer = StringBuilder()
        stream(history + message("user", parts)) { answer.append(it); onText(it) }
        if ("<answer>" in answer && "</answer>" !in answer) answer.append("</answer>")
        // The image leaves the history, so that each request holds one.
        history.add(message("user", words))
        history.add(message("assistant", answer.toString()))
        return answer.toString()
    }

    /** Ends a [step], at the latest when the server next sends something; the server then stops too. */
    override fun close() {
        connection?.disconnect()
    }

    private fun stream(messages: List<JSONObject>, onText: (String) -> Unit) {
        val body = JSONObject()
            .put("model", "autoglm-phone-9b")
            .put("messages", JSONArray(messages))
            .put("stream", true)
            .put("max_tokens", 3000)
            .put("temperature", 0.0)
            .toString().toByteArray()
        val http = URL("$base/chat/completions").openConnection() as HttpURLConnection
        connection = http
        try {
            http.requestMethod = "POST"
            http.doOutput = true
            http.connectTimeout = 5_000  // ms
            http.readTimeout = 600_000  // ms; a phone may take minutes to read a screenshot
            http.setRequestProperty("Content-Type", "application/json")
            http.setFixedLengthStreamingMode(body.size)
            http.outputStream.use { it.write(body) }
            if (http.responseCode != 200) {
                val said = http.errorStream?.bufferedReader()?.readText() ?: ""
                throw IOException("$base: status ${http.responseCode} (required 200): $said")
            }
            http.inputStream.bufferedReader().useLines { lines ->
                lines.filter { it.startsWith("data:") }
                    .map { it.removePrefix("data:").trim() }
                    .takeWhile { it != "[DONE]" }
                    .forEach { event -> contentOf(JSONObject(event))?.let(onText) }
            }
        } finally {
            connection = null
            http.disconnect()
        }
    }

    private fun contentOf(event: JSONObject): String? {
        event.optJSONObject("error")?.let { throw IOException(it.optString("message")) }
        val delta = event.optJSONArray("choices")?.optJSONObject(0)?.optJSONObject("delta")
        // optString makes the word "null" of a null
        return if (delta == null || delta.isNull("content")) null else delta.getString("content")
    }

    private fun message(role: String, content: Any) = JSONObject().put("role", role).put("content", content)

    private fun dataUrl(file: ByteArray): String {
        val kind = if (file[0] == 0x89.toByte()) "png" else "jpeg"
        return "data:image/$kind;base64," + Base64.getEncoder().encodeToString(file)
    }
}

/** On a desktop: `BASE TASK SCREENSHOT`, to see the client work without a phone. */
fun main(arguments: Array<String>) {
    val (base, task, screenshot) = arguments
    AutoGlmClient(base).use { it.step(File(screenshot).readBytes(), "Home", task, ::print) }
    println()
}
